"""`adapter_linear` in the compiled library. The protocol is in contract.py.

skinny  on the CPU and on CUDA: the wide products by PyTorch's library, the narrow ones by kernels
        that fold in the activation, the residual and the sums
fused   on CUDA: forward and dh in one kernel each, which makes z on the way
concat  on CUDA: z by a narrow kernel, then one product over (h, weight) and (z, V); dh as fused
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native
from ..activations import activation_code
from ..rule import AdapterGrads, cast, contiguous
from .up import merged, up_grads

load_native()

_native = torch.ops.a3fta_native

__all__ = ["RANK_LIMITS", "backward", "forward", "merged", "paths", "up_grads"]

RANK_LIMITS: dict[str, int] = {}


def paths(device_type: str) -> tuple[str, ...]:
    """The ways of computing on this device."""
    return ("skinny", "fused", "concat") if device_type == "cuda" else ("skinny",)


def forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    v: Tensor,
    b_down: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    start: int,
    activation: str,
    path: str,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and a (M, R)."""
    code = activation_code(activation)
    v, bias = v.contiguous(), contiguous(bias)
    b_down, gamma, beta = contiguous(cast(b_down, h.dtype)), contiguous(gamma), contiguous(beta)
    if path == "fused":
        y, a = _native.adapter_linear_forward.default(
            h, weight, bias, w_down, v, b_down, gamma, beta, residual, start, code
        )
        return y, a
    part = h.narrow(1, start, w_down.shape[1])
    a, z = _native.adapter_down.default(part, w_down, b_down, gamma, beta, code)
    if path == "concat":
        return _native.adapter_linear_concat.default(h, weight, bias, z, v, residual), a
    y = _native.adapter_up.default(z, v, bias, residual)
    return y.addmm_(h, weight.t()), a


def backward(
    dy: Tensor,
    hs: Tensor,
    a: Tensor,
    weight: Tensor,
    w_down: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    start: int,
    activation: str,
    path: str,
    need_dh: bool,
    need_dw: bool,
) -> AdapterGrads:
    """Gradients; g_up is P = dy.T @ z (N, R)."""
    gamma, beta = contiguous(gamma), contiguous(beta)
    da, p, dy_sum, dgamma, dbeta = _native.adapter_dz.default(
        dy, a, v.contiguous(), gamma, beta, activation_code(activation), need_dw
    )
    dh = None
    if need_dh and path in ("fused", "concat"):
        dh = _native.adapter_linear_backward_dh.default(dy, da, weight, w_down, start)
    elif need_dh:
        dh = torch.mm(dy, weight)
        _native.adapter_dh_.default(dh.narrow(1, start, w_down.shape[1]), da, w_down)
    if not need_dw:
        return AdapterGrads(dh)
    dw_down, da_sum = _native.adapter_dw_down.default(da, hs)
    return AdapterGrads(
        dh,
        dw_down,
        p,
        da_sum,
        dy_sum,
        None if gamma is None else dgamma,
        None if beta is None else dbeta,
    )
