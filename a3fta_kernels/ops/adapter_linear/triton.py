"""`adapter_linear` in Triton, three ways.

skinny  forward: r = residual + bias + z @ V.T in one pass over h, then r += h @ weight.T by
        the library GEMM. Backward: dy @ weight by the library, then da @ w_down added to it.
fused   forward: one GEMM that reads each h tile once for weight and w_down, and makes z of what
        it has. Backward: one GEMM whose K loop runs over (dy, weight) and then (da, w_down).
concat  forward: z in one pass over h, then one GEMM whose K loop runs over (h, weight) and then
        (z, V). Backward as fused.

On every path V is made by one launch, da comes from one pass over dy, and P and dw_down are sums
over rows.
"""

from __future__ import annotations

from torch import Tensor

from ...triton_support import MAX_BLOCK_R
from ..gemm_triton import concat_gemm
from ..grad_triton import adapter_grads
from ..rule import AdapterGrads
from ..skinny_triton import rows_backward, rows_forward
from .fused_triton import FUSED_RANK_LIMIT, fused_forward
from .up_triton import merged, up_grads

__all__ = ["RANK_LIMITS", "backward", "forward", "merged", "paths", "up_grads"]

# the fused kernel holds z's accumulator beside y's: a larger one leaves too few registers
RANK_LIMITS = {"fused": FUSED_RANK_LIMIT}


def paths(device_type: str) -> tuple[str, ...]:
    return ("skinny", "fused", "concat")


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
    """(y, a) by the protocol of contract.py."""
    rank, length = w_down.shape
    v = v.contiguous()
    if path == "fused":
        return fused_forward(
            h, weight, bias, w_down, v, b_down, gamma, beta, residual, start, activation
        )
    inside = h[:, start : start + length]
    if path == "skinny" and rank <= MAX_BLOCK_R:
        a, r = rows_forward(
            inside, w_down, b_down, gamma, beta, activation, v=v, bias=bias, residual=residual
        )
        return r.addmm_(h, weight.t()), a
    a, z = rows_forward(inside, w_down, b_down, gamma, beta, activation)
    if path == "concat":
        return concat_gemm(h, weight.t(), z, v.t(), bias=bias, residual=residual), a
    r = concat_gemm(None, None, z, v.t(), bias=bias, residual=residual)
    return r.addmm_(h, weight.t()), a


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
    """By the protocol of contract.py."""
    row_grads = rows_backward(dy, a, v.contiguous(), gamma, beta, activation, need_sums=need_dw)
    dh = None
    if need_dh and path == "skinny":
        dh = dy @ weight
        dh[:, start : start + w_down.shape[1]].addmm_(row_grads.da, w_down)
    elif need_dh:
        dh = concat_gemm(dy, weight, row_grads.da, w_down, start=start)
    if not need_dw:
        return AdapterGrads(dh)
    return adapter_grads(dh, hs, dy, row_grads)
