# mypy: allow-untyped-defs
"""`adapter_linear` in Triton, three ways.

skinny  forward: r = residual + bias + z @ V.T in one pass over h, then r += h @ weight.T by
        the library GEMM. Backward: dy @ weight by the library, then da @ w_down added to it.
fused   forward: one GEMM that reads each h tile once for weight and w_down, and makes z of what
        it has. Backward: one GEMM whose K loop runs over (dy, weight) and then (da, w_down).
concat  forward: z in one pass over h, then one GEMM whose K loop runs over (h, weight) and then
        (z, V). Backward as fused.

On every path da comes from one pass over dy, and P and dw_down are sums over rows.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Config,
    Launcher,
    config,
    dense,
    dot,
    grouped_tile,
    modulated,
    rank_block,
    rows_bucket,
    rows_per_sample,
    shared_limit,
)
from ..activations import activation_code
from ..gemm_triton import concat_gemm
from ..grad_triton import weight_grad
from ..rule import AdapterGrads
from ..skinny_triton import RANK_LIMIT, rows_backward, rows_forward

FUSED_RANK_LIMIT = 64


@triton.jit
def plain_span(
    acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, first, last, K, BLOCK_K: tl.constexpr
):
    """acc + h[:, first:last] @ weight[:, first:last].T"""
    for k in range(first, last, BLOCK_K):
        mask_k = offs_k < K - k
        h = tl.load(h_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs + k, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = dot(h, w, acc)
    return acc


@triton.jit
def adapted_span(
    acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k, first, last, K,
    start, C, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same, and acc_a + h @ w_down.T, whose columns are those of h from `start`."""
    for k in range(first, last, BLOCK_K):
        mask_k = offs_k < K - k
        mask_c = (offs_k >= start - k) & (offs_k < start + C - k)
        h = tl.load(h_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        w = tl.load(weight_ptrs + k, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        d = tl.load(w_down_ptrs + (k - start), mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        acc = dot(h, w, acc)
        acc_a = dot(h, d, acc_a)
    return acc, acc_a


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def linear_forward_kernel(
    h_ptr, weight_ptr, bias_ptr, w_down_ptr, v_ptr, b_down_ptr, gamma_ptr, beta_ptr, residual_ptr,
    y_ptr, a_ptr,
    M, N, K, C, R, start, rows_per_sample, stride_hm, stride_wn, stride_residual_m, stride_ym,
    WHOLE: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y (M, N) and a (M, R) for h (M, K), weight (N, K), w_down (R, C), v (N, R).

    WHOLE says that the adapter reads all columns of h. `a` is written by the first column of
    tiles.
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]

    h_ptrs = h_ptr + rows * stride_hm + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_k[:, None]
    w_down_ptrs = w_down_ptr + offs_r[None, :] * C + offs_k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if WHOLE:
        acc, acc_a = adapted_span(
            acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k,
            0, K, K, 0, C, BLOCK_K,
        )  # fmt: skip
    else:
        first = start // BLOCK_K * BLOCK_K
        last = tl.cdiv(start + C, BLOCK_K) * BLOCK_K
        acc = plain_span(acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, 0, first, K, BLOCK_K)
        acc, acc_a = adapted_span(
            acc, acc_a, h_ptrs, weight_ptrs, w_down_ptrs, mask_m, mask_n, mask_r, offs_k,
            first, last, K, start, C, BLOCK_K,
        )  # fmt: skip
        acc = plain_span(acc, h_ptrs, weight_ptrs, mask_m, mask_n, offs_k, last, K, K, BLOCK_K)

    if b_down_ptr is not None:
        acc_a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    if pid_n == 0:
        a_ptrs = a_ptr + rows * R + offs_r[None, :]
        tl.store(a_ptrs, acc_a.to(a_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    z = modulated(
        acc_a, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT
    )
    v_ptrs = v_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
    v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    acc = dot(z.to(v.dtype), v, acc)

    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_forward_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_n, block_k, num_warps, num_stages in _FP32 if itemsize == 4 else _HALF:
        shared = num_stages * itemsize * block_k * (block_m + block_n + block_r)
        accumulators = block_m * (block_n + block_r) // (32 * num_warps)
        # without wgmma (sm_80, 89, 120) a product's operands stand in registers too
        fits = capability in (90, 100, 103) or itemsize == 4 or accumulators * block_k <= 4096
        if shared <= shared_limit(capability) and fits:
            found.append(
                config(
                    num_warps, num_stages,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
                )
            )  # fmt: skip
    return found


_HALF = (
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 8, 3),
    (64, 64, 32, 4, 4),
    (64, 128, 32, 8, 3),
)
_FP32 = ((64, 64, 16, 8, 2), (32, 32, 16, 4, 2))

launch_linear_forward = Launcher(linear_forward_kernel, linear_forward_configs)

AOT_KERNELS = (
    AotKernel(
        launch_linear_forward,
        pointers={"bias_ptr": "fp32"},
        variants={
            "whole": {"ACT": 2, "WHOLE": True, "start": 0},
            "slice": {"ACT": 2, "WHOLE": False},
        },
        ranks=(16, 64),
    ),
)


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
        return _fused_forward(
            h, weight, bias, w_down, v, b_down, gamma, beta, residual, start, activation
        )
    inside = h[:, start : start + length]
    if path == "skinny" and rank <= RANK_LIMIT:
        a, r = rows_forward(
            inside, w_down, b_down, gamma, beta, activation, v=v, bias=bias, residual=residual
        )
        return r.addmm_(h, weight.t()), a
    a, z = rows_forward(inside, w_down, b_down, gamma, beta, activation)
    if path == "concat":
        return concat_gemm(h, weight.t(), z, v.t(), bias=bias, residual=residual), a
    r = concat_gemm(None, None, z, v.t(), bias=bias, residual=residual)
    return r.addmm_(h, weight.t()), a


def _fused_forward(
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
) -> tuple[Tensor, Tensor]:
    m, k = h.shape
    n = weight.shape[0]
    rank, length = w_down.shape
    y, a = h.new_empty(m, n), h.new_empty(m, rank)
    if m == 0:
        return y, a
    block_r = rank_block(rank, FUSED_RANK_LIMIT)
    whole = length == k

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        grid = (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)
        return grid, dict(
            h_ptr=h, weight_ptr=weight, bias_ptr=dense(bias), w_down_ptr=w_down, v_ptr=v,
            b_down_ptr=dense(b_down), gamma_ptr=dense(gamma), beta_ptr=dense(beta),
            residual_ptr=residual, y_ptr=y, a_ptr=a, M=m, N=n, K=k, C=length, R=rank,
            start=start, rows_per_sample=rows_per_sample(m, gamma, beta), stride_hm=h.stride(0),
            stride_wn=weight.stride(0),
            stride_residual_m=0 if residual is None else residual.stride(0), stride_ym=n,
            WHOLE=whole, ACT=activation_code(activation),
        )  # fmt: skip

    launch_linear_forward(plan, h, block_r, rows_bucket(m), n, k, whole, residual is None)
    return y, a


def backward(
    dy: Tensor,
    h: Tensor,
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
    length = w_down.shape[1]
    up = rows_backward(dy, a, v.contiguous(), gamma, beta, activation, need_sums=need_dw)
    dh = None
    if need_dh and path == "skinny":
        dh = dy @ weight
        dh[:, start : start + length].addmm_(up.da, w_down)
    elif need_dh:
        dh = concat_gemm(dy, weight, up.da, w_down, start=start)
    if not need_dw:
        return AdapterGrads(dh, None, None, None, None, None, None)
    dw_down, _ = weight_grad(h[:, start : start + length], up.da, transposed=True)
    g_up, dy_sum = weight_grad(dy, a, from_a=True, gamma=gamma, beta=beta, activation=activation)
    return AdapterGrads(dh, dw_down, g_up, up.da_sum, dy_sum, up.dgamma, up.dbeta)
