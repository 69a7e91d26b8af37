"""The specification of `adapter_bank` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..activations import activate
from ..rule import cast


def adapter_bank(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    index: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """h_b + scale[k] * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k]), k = index[b].

    h (B, ..., C); w_down (K, R, C); w_up (K, C, R); index (B,), -1: h_b itself. The bank is cast
    to h's dtype.
    """
    dtype = h.dtype
    k = index.clamp(min=0).long()
    x = h.reshape(h.shape[0], math.prod(h.shape[1:-1]), h.shape[-1])
    a = _product(x, w_down.to(dtype)[k], _of(b_down, k, dtype))
    u = _product(activate(a, activation), w_up.to(dtype)[k], _of(b_up, k, dtype))
    if scale is not None:
        u = scale.to(dtype)[k][:, None, None] * u
    return torch.where((index >= 0)[:, None, None], x + u, x).view(h.shape)


def _of(bias: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else cast(bias, dtype)[k][:, None]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, N) of x (B, L, K), weight (B, N, K), bias (B, 1, N): linear layers side by side."""
    return x @ weight.mT if bias is None else torch.baddbmm(bias, x, weight.mT)
