"""The specification of `geglu` in eager PyTorch, whose gradients come from PyTorch; and the rule of
contract.py in eager PyTorch, which `auto` takes where there are no kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate


def geglu(p: Tensor, *, activation: str = "gelu") -> Tensor:
    """hidden * act(gate) of shape (..., F) for p (..., 2F) = [hidden | gate]."""
    hidden, gate = p.chunk(2, dim=-1)
    return hidden * activate(gate, activation)


def forward(p: Tensor, activation: str) -> Tensor:
    """By the protocol of contract.py."""
    return geglu(p, activation=activation)


def backward(dy: Tensor, p: Tensor, activation: str) -> Tensor:
    hidden, gate = p.chunk(2, dim=-1)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        y = activate(leaf, activation)
    (dgate,) = torch.autograd.grad(y, leaf, dy * hidden)
    return torch.cat([dy * y.detach(), dgate], dim=-1)
