"""The specification of `layer_norm` in eager PyTorch, whose gradients come from PyTorch; and the
rule of contract.py in eager PyTorch, which `auto` takes where there are no kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..norm import common_dtype
from ..rule import acc_dtype, cast


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """weight * xhat + bias, xhat of mean 0 and variance 1 over the last dimension.

    x (..., C); weight and bias (C,). Computed in the widest of their dtypes, and of x's.
    """
    dtype = common_dtype(x, weight, bias)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], cast(weight, dtype), cast(bias, dtype), eps)
    return y.to(x.dtype)


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """By the protocol of contract.py."""
    wide = acc_dtype(x.dtype)
    variance, mean = torch.var_mean(x.to(wide), dim=1, correction=0)
    return layer_norm(x, weight, bias, eps=eps).contiguous(), mean, (variance + eps).rsqrt()


def backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None) -> Tensor:
    wide = mean.dtype
    xhat = (x.to(wide) - mean[:, None]) * rstd[:, None]
    g = dy.to(wide) if weight is None else dy.to(wide) * weight.to(wide)
    dx = g - g.mean(dim=1, keepdim=True) - xhat * (g * xhat).mean(dim=1, keepdim=True)
    return (dx * rstd[:, None]).to(x.dtype).contiguous()
