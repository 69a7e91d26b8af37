"""The activations every backend implements, in PyTorch terms.

The order of `ACTIVATIONS` is the integer code that the compiled library and Triton use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "silu")


def activation_code(name: str) -> int:
    return ACTIVATIONS.index(name)


def activate(a: Tensor, name: str) -> Tensor:
    """act(a), differentiable."""
    if name == "identity":
        return a
    if name == "relu":
        return F.relu(a)
    if name == "gelu":
        return F.gelu(a)
    if name == "gelu_tanh":
        return F.gelu(a, approximate="tanh")
    if name == "silu":
        return F.silu(a)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")


def activation_grad(dz: Tensor, a: Tensor, name: str) -> Tensor:
    """dz * act'(a), without autograd."""
    if name == "identity":
        return dz
    if name == "relu":
        return torch.where(a > 0, dz, torch.zeros_like(dz))
    if name == "gelu":
        return torch.ops.aten.gelu_backward(dz, a)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(dz, a, approximate="tanh")
    if name == "silu":
        return torch.ops.aten.silu_backward(dz, a)
    raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
