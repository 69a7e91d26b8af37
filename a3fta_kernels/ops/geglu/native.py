"""`geglu` in the compiled library, on the CPU and on CUDA. The protocol is in contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native
from ..activations import activation_code

load_native()

_forward = torch.ops.a3fta_native.geglu_forward.default
_backward = torch.ops.a3fta_native.geglu_backward.default


def forward(p: Tensor, activation: str) -> Tensor:
    """y (M, F)."""
    return _forward(p, activation_code(activation))


def backward(dy: Tensor, p: Tensor, activation: str) -> Tensor:
    """dp (M, 2F)."""
    return _backward(dy, p, activation_code(activation))
