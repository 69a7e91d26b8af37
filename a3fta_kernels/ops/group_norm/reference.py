"""The specification of `group_norm` in eager PyTorch, whose gradients come from PyTorch; and the
rule of contract.py in eager PyTorch, which `auto` takes where there are no kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import activate
from ..norm import common_dtype
from ..rule import acc_dtype, cast


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "identity",
) -> Tensor:
    """act(weight * xhat + bias), xhat of mean 0 and variance 1 over each sample's group.

    x (B, C, *spatial); weight and bias (C,). Computed in the widest of their dtypes, and of x's.
    """
    dtype = common_dtype(x, weight, bias)
    y = x.to(dtype)
    if y.numel() > 0:  # PyTorch refuses images without pixels from 2.14 on
        y = torch.group_norm(y, num_groups, cast(weight, dtype), cast(bias, dtype), eps)
    return activate(y, activation).to(x.dtype)


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """By the protocol of contract.py."""
    grouped = x.to(acc_dtype(x.dtype)).unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, dim=(2, 3), correction=0)
    y = group_norm(x, groups, weight, bias, eps=eps, activation=activation)
    return torch.empty_like(x).copy_(y), mean, (variance + eps).rsqrt()


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    wide, groups = mean.dtype, mean.shape[1]
    by_group = (*mean.shape, 1, 1)
    xhat = (x.to(wide).unflatten(1, (groups, -1)) - mean.view(by_group)) * rstd.view(by_group)
    g = dy.to(wide).unflatten(1, (groups, -1))
    scale = 1 if weight is None else weight.to(wide).view(groups, -1, 1)
    if activation == "silu":
        u = xhat * scale + (0 if bias is None else bias.to(wide).view(groups, -1, 1))
        s = torch.sigmoid(u)
        g = g * (s + u * s * (1 - s))
    g = g * scale
    dx = g - g.mean(dim=(2, 3), keepdim=True) - xhat * (g * xhat).mean(dim=(2, 3), keepdim=True)
    return torch.empty_like(x).copy_((dx * rstd.view(by_group)).flatten(1, 2))
