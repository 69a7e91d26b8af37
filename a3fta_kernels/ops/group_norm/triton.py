"""`group_norm` in Triton: one launch where a program holds a group, else three over tiles.

The protocol is in contract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..norm_tiles_triton import norm_tiles_backward, norm_tiles_forward
from ..norm_triton import fits_a_row, norm_rows_backward, norm_rows_forward


def forward(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, C, S), mean and rstd (B, G)."""
    b, _, s = x.shape
    if x.numel() == 0:
        mean, rstd = (x.new_empty(b, groups, dtype=torch.float32) for _ in range(2))
        # of nothing, as PyTorch says it
        return torch.empty_like(x), mean.zero_(), rstd.fill_(torch.nan)
    if not in_rows(x, groups):
        return norm_tiles_forward(x, groups, weight, bias, eps, activation)
    flat = x.reshape(b * groups, -1)
    y, mean, rstd = norm_rows_forward(flat, groups, s, weight, bias, eps, activation)
    return y.view(x.shape), mean.view(b, groups), rstd.view(b, groups)


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
    if x.numel() == 0:
        return torch.empty_like(x)
    b, groups = mean.shape
    if not in_rows(x, groups):
        return norm_tiles_backward(dy, x, mean, rstd, weight, bias, activation)
    flat = (b * groups, x.numel() // (b * groups))
    dx = norm_rows_backward(
        dy.reshape(flat), x.reshape(flat), mean, rstd, groups, x.shape[2], weight, bias, activation
    )
    return dx.view(x.shape)


def in_rows(x: Tensor, groups: int) -> bool:
    """Whether a group is one run of memory that a program holds."""
    return x.is_contiguous() and fits_a_row(x.numel() // (x.shape[0] * groups), x)
