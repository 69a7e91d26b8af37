"""`adapter` in the compiled library, on the CPU and on CUDA. The protocol is in contract.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import BackendUnavailableError, native_status
from ..activations import activation_code
from ..rule import AdapterGrads

# loads the library: its operators exist from here on
if not native_status().available:
    raise BackendUnavailableError(f"backend 'native': {native_status().reason}")

_forward = torch.ops.a3fta_native.adapter_forward.default
_backward = torch.ops.a3fta_native.adapter_backward.default


def forward(
    h: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y (M, C) and a (M, R)."""
    y, a = _forward(
        h,
        w_down,
        w_up,
        dense(b_down),
        dense(b_up),
        dense(gamma),
        dense(beta),
        activation_code(activation),
    )
    return y, a


def backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    need_dh: bool,
    need_dw: bool,
) -> AdapterGrads:
    gamma, beta = dense(gamma), dense(beta)
    grads = _backward(
        dy, h, a, w_down, w_up, gamma, beta, activation_code(activation), need_dh, need_dw
    )
    dh, dw_down, g_up, da_sum, dy_sum, dgamma, dbeta = grads
    return AdapterGrads(
        dh if need_dh else None,
        dw_down if need_dw else None,
        g_up if need_dw else None,
        da_sum if need_dw else None,
        dy_sum if need_dw else None,
        dgamma if need_dw and gamma is not None else None,
        dbeta if need_dw and beta is not None else None,
    )


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
