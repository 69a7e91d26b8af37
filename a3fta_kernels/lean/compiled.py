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

from ..placements import beside
from ..projection import AdaptedProjectionMixin
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


def compiled(
    stock: Callable, by_stages: Callable, block: nn.Module, inputs: tuple, fits: bool
) -> Any:
    """stock(block, *inputs) as the compiler should see it.

    An adapter beside attention is handed its input by a hook, and of what is computed again the
    compiler wants no side effects: with such a one the block goes by its stages, where that fits.
    """
    if drops(block, adapters=True):
        return stock(block, *inputs)
    forward = stock
    if any(isinstance(m, AdaptedProjectionMixin) and beside(m) for m in block.modules()):
        if not fits:
            return stock(block, *inputs)
        forward = by_stages
    return checkpoint(forward, block, *inputs, use_reentrant=False, context_fn=_contexts)
