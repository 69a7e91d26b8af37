"""`cross_attention_adapter` in Triton: the library's attention, and a backward of our own for it.

forward   PyTorch's attention, then `adapter_linear`. A kernel that did both up to z was written and
          lost to this on an H200 (benchmarks/NOTES.md).
backward  da and the sums over rows in one pass over dy, dy @ weight by the library GEMM, and the
          kernels of backward_triton, which make dq of both, and dk and dv where asked for. They
          make the probabilities anew, so the forward keeps nothing for them but h.
"""

from __future__ import annotations

from torch import Tensor

from ..adapter_linear import triton as adapter_linear
from ..adapter_linear.contract import take_path
from ..adapter_linear.up_triton import merged, up_grads
from ..grad_triton import adapter_grads
from ..rule import AdapterGrads, rows
from ..skinny_triton import rows_backward
from .attention import attention
from .backward_triton import attention_grads

__all__ = ["backward", "forward", "merged", "up_grads"]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    v_up: Tensor,
    b_down: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    heads: int,
    attention_scale: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, h, a) by the protocol of contract.py."""
    h = attention(q, k, v, heads=heads, mask=mask, attention_scale=attention_scale)
    h = rows(h.flatten(0, 1))
    path = take_path("auto", "triton", h, weight, w_down.shape[0])
    y, a = adapter_linear.forward(
        h, weight, bias, w_down, v_up, b_down, gamma, beta, residual, 0, activation, path
    )
    return y, h, a


def backward(
    dy: Tensor,
    h: Tensor,
    a: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    w_down: Tensor,
    v_up: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    heads: int,
    attention_scale: float,
    activation: str,
    need_q: bool,
    need_kv: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, AdapterGrads]:
    """By the protocol of contract.py."""
    row_grads = rows_backward(dy, a, v_up.contiguous(), gamma, beta, activation, need_sums=need_dw)
    dq = dk = dv = None
    if need_q or need_kv:
        dq, dk, dv = attention_grads(
            dy @ weight, row_grads.da, w_down, q, k, v, mask, heads, attention_scale, need_kv
        )
    if not need_dw:
        return dq, dk, dv, AdapterGrads(None)
    return dq, dk, dv, adapter_grads(None, h, dy, row_grads)
