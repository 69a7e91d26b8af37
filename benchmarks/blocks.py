"""One transformer block of a U-Net, as diffusers has it, with adapters by each backend.

Self-attention, cross-attention and the feed-forward layer, at the widths of SD1.5 and SDXL. All but
the adapters is frozen; the gradient goes on to the block's input, not to the text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta

from .workloads import Workload


def frozen(w: Workload, dtype: torch.dtype, device: torch.device) -> nn.Module:
    from diffusers.models.attention import BasicTransformerBlock

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = BasicTransformerBlock(w.c, w.heads, w.c // w.heads, cross_attention_dim=w.text)
    return block.to(device, dtype).requires_grad_(False)


def inputs(w: Workload, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """x (B, L, C) and text (B, S, T)."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(w.batch, w.tokens, w.c, generator=g).to(device, dtype).requires_grad_()
    return {"x": x, "text": torch.randn(w.batch, w.keys, w.text, generator=g).to(device, dtype)}


def copy_of(block: nn.Module) -> nn.Module:
    """The same layers over the same frozen tensors."""
    return copy.deepcopy(block, {id(p): p for p in block.parameters()})


def adapted(block: nn.Module, rank: int, backend: str) -> nn.Module:
    """A copy with adapters whose values do not depend on the backend; none of them is zero."""
    module = copy_of(block)
    a3fta.inject(module, a3fta.AdapterConfig(rank=rank), backend=backend)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in trained(module).values():
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[-1] ** -0.5)
    return module


def trained(module: nn.Module | None) -> dict[str, Tensor]:
    if module is None:
        return {}
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def runner(module: nn.Module) -> Callable[..., Tensor]:
    def run(x: Tensor, text: Tensor) -> Tensor:
        return module(x, encoder_hidden_states=text)

    return run
