"""The specification of `geglu` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..activations import activate


def geglu(p: Tensor, *, activation: str = "gelu") -> Tensor:
    """hidden * act(gate) of shape (..., F) for p (..., 2F) = [hidden | gate]."""
    hidden, gate = p.chunk(2, dim=-1)
    return hidden * activate(gate, activation)
