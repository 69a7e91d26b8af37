"""`adapter` in Triton: one launch forward; backward one for the rows, two for the weights'
gradients, in parts, and one that adds the parts."""

from __future__ import annotations

from torch import Tensor

from ...triton_support import MAX_BLOCK_R
from ..gemm_triton import concat_gemm
from ..grad_triton import adapter_grads
from ..rule import AdapterGrads
from ..skinny_triton import rows_backward, rows_forward


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
    """(y, a) by the protocol of contract.py. A rank above MAX_BLOCK_R takes two kernels."""
    base = h if base is None else base
    if w_down.shape[0] <= MAX_BLOCK_R:
        a, y = rows_forward(
            h, w_down, b_down, gamma, beta, activation, v=w_up, bias=b_up, residual=base
        )
        return y, a
    a, z = rows_forward(h, w_down, b_down, gamma, beta, activation)
    return concat_gemm(None, None, z, w_up.t(), bias=b_up, residual=base), a


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
    """By the protocol of contract.py."""
    whole = w_down.shape[0] <= MAX_BLOCK_R and not apart
    row_grads = rows_backward(
        dy, a, w_up, gamma, beta, activation,
        need_sums=need_dw,
        w_down=w_down if need_dh and whole else None,
    )  # fmt: skip
    dh = row_grads.dh
    if need_dh and apart:
        dh = row_grads.da @ w_down
    elif need_dh and not whole:
        dh = concat_gemm(None, None, row_grads.da, w_down, residual=dy)
    if not need_dw:
        return AdapterGrads(dh)
    return adapter_grads(dh, h, dy, row_grads)
