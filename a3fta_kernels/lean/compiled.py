"""Blocks under torch.compile: PyTorch's own selective checkpointing, which the compiler knows.

What is computed again is all of a block but its attention, as at level block; the compiler
schedules it, and fuses it with the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from .swapping import drops

# attention is never computed twice
_KEPT = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.a3fta.cross_attention_adapter.default,
}


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_contexts = functools.partial(create_selective_checkpoint_contexts, _policy)


def compiled(forward: Callable, block: nn.Module, inputs: tuple) -> Any:
    """forward(block, *inputs) as the compiler should see it."""
    if not torch.is_grad_enabled() or drops(block, adapters=True):
        return forward(block, *inputs)
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=_contexts)
