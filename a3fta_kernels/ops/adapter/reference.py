"""The specification of `adapter` in eager PyTorch. Gradients come from PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..activations import activate
from ..rule import cast


def adapter(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    *,
    base: Tensor | None = None,
    scale: float | Tensor = 1.0,
    activation: str = "gelu",
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
) -> Tensor:
    """base + scale * (z @ w_up.T + b_up), z = act(h @ w_down.T + b_down) * (1 + gamma) + beta.

    h (..., C); base (..., N), default h; w_down (R, C); w_up (N, R); gamma, beta (B, R) with
    B = h.shape[0]. Adapter tensors are cast to h's dtype.
    """
    dtype = h.dtype
    a = F.linear(h, w_down.to(dtype), cast(b_down, dtype))
    z = activate(a, activation)
    if gamma is not None:
        z = z * (1 + per_sample(gamma.to(dtype), z))
    if beta is not None:
        z = z + per_sample(beta.to(dtype), z)
    u = F.linear(z, w_up.to(dtype), cast(b_up, dtype))
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
    return (h if base is None else base) + scale * u


def per_sample(x: Tensor, like: Tensor) -> Tensor:
    """(B, R) seen as (B, 1, ..., 1, R) beside a (B, ..., R) tensor."""
    return x.view(x.shape[0], *([1] * (like.dim() - 2)), x.shape[1])
