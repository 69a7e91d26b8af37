"""`adapter` in the compiled library, on the CPU and on CUDA. The protocol is in contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native
from ..activations import activation_code
from ..rule import AdapterGrads, acc_dtype, cast, contiguous

load_native()

_native = torch.ops.a3fta_native


def forward(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    base: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and a (M, R)."""
    code = activation_code(activation)
    b_down, b_up, gamma, beta = (contiguous(x) for x in (b_down, b_up, gamma, beta))
    if base is None:
        return _native.adapter_forward.default(h, w_down, w_up, b_down, b_up, gamma, beta, code)
    a, z = _native.adapter_down.default(h, w_down, b_down, gamma, beta, code)
    return _native.adapter_up.default(z, w_up, cast(b_up, acc_dtype(h.dtype)), base), a


def backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    apart: bool,
    need_dh: bool,
    need_dw: bool,
) -> AdapterGrads:
    gamma, beta, code = contiguous(gamma), contiguous(beta), activation_code(activation)
    if apart:
        da, g_up, dy_sum, dgamma, dbeta = _native.adapter_dz.default(
            dy, a, w_up, gamma, beta, code, need_dw
        )
        dh = da @ w_down if need_dh else None
        dw_down, da_sum = _native.adapter_dw_down.default(da, h) if need_dw else (None, None)
    else:
        dh, dw_down, g_up, da_sum, dy_sum, dgamma, dbeta = _native.adapter_backward.default(
            dy, h, a, w_down, w_up, gamma, beta, code, need_dh, need_dw
        )
    return AdapterGrads(
        dh if need_dh else None,
        dw_down if need_dw else None,
        g_up if need_dw else None,
        da_sum if need_dw else None,
        dy_sum if need_dw else None,
        dgamma if need_dw and gamma is not None else None,
        dbeta if need_dw and beta is not None else None,
    )
