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
    base: Tensor | None = None,
    scale: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """base_b + scale[k] * (act(h_b @ w_down[k].T + b_down[k]) @ w_up[k].T + b_up[k]), k = index[b].

    h (B, ..., C); base (B, ..., N), or None for h; w_down (K, R, C); w_up (K, N, R); index (B,),
    -1: base_b itself. The bank is cast to h's dtype.
    """
    dtype = h.dtype
    k = index.clamp(min=0).long()
    x = h.reshape(h.shape[0], math.prod(h.shape[1:-1]), h.shape[-1])
    a = _product(x, w_down.to(dtype)[k], _of(b_down, k, dtype))
    u = _product(activate(a, activation), w_up.to(dtype)[k], _of(b_up, k, dtype))
    if scale is not None:
        u = scale.to(dtype)[k][:, None, None] * u
    y = x if base is None else base.reshape(*x.shape[:2], base.shape[-1])
    y = torch.where((index >= 0)[:, None, None], y + u, y)
    return y.contiguous().view(*h.shape[:-1], y.shape[-1])


def _of(bias: Tensor | None, k: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else cast(bias, dtype)[k][:, None]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, L, N) of x (B, L, K), weight (B, N, K), bias (B, 1, N): linear layers side by side."""
    return x @ weight.mT if bias is None else torch.baddbmm(bias, x, weight.mT)
