"""`group_norm` in the compiled library, on the CPU and on CUDA. The protocol is in contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native
from ..activations import activation_code

load_native()

_forward = torch.ops.a3fta_native.group_norm_forward.default
_backward = torch.ops.a3fta_native.group_norm_backward.default


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, S), mean and rstd (B, G)."""
    return _forward(x, groups, weight, bias, eps, activation_code(activation))


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    """dx (B, C, S)."""
    return _backward(dy, x, mean, rstd, weight, bias, activation_code(activation))
