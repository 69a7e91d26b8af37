# mypy: allow-untyped-defs
"""One GEMM whose K loop runs over two pairs of matrices: nothing is concatenated in memory."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import (
    AotKernel,
    Config,
    Launcher,
    config,
    dense,
    dot,
    grouped_tile,
    rank_block,
    rows_bucket,
    shared_limit,
)

RANK_STEP = 64  # the second K loop takes the rank in steps of at most this


@triton.jit(do_not_specialize=["M"])
def concat_gemm_kernel(
    x_ptr, w_ptr, s_ptr, t_ptr, bias_ptr, residual_ptr, out_ptr,
    M, N, K, R, start, length, stride_xm, stride_wk, stride_wn, stride_tr, stride_tn,
    stride_residual_m, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) @ w (K, N) + bias (N,) + residual (M, N),
    out[:, start : start + length] += s (M, R) @ t (R, length).
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    rows = offs_m.to(tl.int64)[:, None]

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if x_ptr is not None:
        offs_k = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + rows * stride_xm + offs_k[None, :]
        w_ptrs = (
            w_ptr
            + offs_n.to(tl.int64)[None, :] * stride_wn
            + offs_k.to(tl.int64)[:, None] * stride_wk
        )
        for k in range(0, K, BLOCK_K):
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
            acc = dot(x, w, acc)
            x_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * stride_wk

    columns = offs_n - start
    mask_t = (columns >= 0) & (columns < length)
    # a tile beside the slice has no second product
    reaches = (pid_n * BLOCK_N < start + length) & ((pid_n + 1) * BLOCK_N > start)
    for r in range(0, tl.where(reaches, R, 0), BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        s_ptrs = s_ptr + rows * R + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        t_ptrs = (
            t_ptr
            + offs_r.to(tl.int64)[:, None] * stride_tr
            + columns.to(tl.int64)[None, :] * stride_tn
        )
        t = tl.load(t_ptrs, mask=mask_r[:, None] & mask_t[None, :], other=0.0)
        acc = dot(s, t, acc)

    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def concat_gemm_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_n, block_k, num_warps, num_stages in _FP32 if itemsize == 4 else _HALF:
        shared = num_stages * itemsize * max(block_k, block_r) * (block_m + block_n)
        if shared <= shared_limit(capability):
            found.append(
                config(
                    num_warps, num_stages,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
                    BLOCK_R=min(block_r, block_k) if itemsize == 4 else block_r,
                )
            )  # fmt: skip
    return found


_HALF = (
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 32, 4, 3),
)
_FP32 = ((64, 32, 16, 8, 2), (32, 32, 16, 4, 2))

launch_concat_gemm = Launcher(concat_gemm_kernel, concat_gemm_configs)

AOT_KERNELS = (
    AotKernel(
        launch_concat_gemm,
        pointers={"bias_ptr": "fp32"},
        variants={
            "forward": {"stride_wk": 1, "stride_tr": 1},
            "backward": {"stride_wn": 1, "stride_tn": 1, "bias_ptr": None, "residual_ptr": None},
            "second only": {"x_ptr": None, "w_ptr": None, "stride_tr": 1},
        },
        ranks=(16, 64),
    ),
)


def concat_gemm(
    x: Tensor | None,
    w: Tensor | None,
    s: Tensor,
    t: Tensor,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """x @ w + bias + residual, with s @ t added to the columns from `start`.

    x (M, K); w (K, N) and t (R, length) of any strides; s (M, R) contiguous. x and w may both be
    None: then length is N.
    """
    m, rank = s.shape
    length = t.shape[1]
    n = length if w is None else w.shape[1]
    out = s.new_empty(m, n)
    if m == 0:
        return out
    block_r = rank_block(rank, RANK_STEP)
    k = 0 if x is None else x.shape[1]

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        grid = (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)
        return grid, dict(
            x_ptr=x, w_ptr=w, s_ptr=s, t_ptr=t, bias_ptr=dense(bias), residual_ptr=residual,
            out_ptr=out, M=m, N=n, K=k, R=rank, start=start, length=length,
            stride_xm=0 if x is None else x.stride(0), stride_wk=0 if w is None else w.stride(0),
            stride_wn=0 if w is None else w.stride(1), stride_tr=t.stride(0),
            stride_tn=t.stride(1), stride_residual_m=0 if residual is None else residual.stride(0),
            stride_om=n,
        )  # fmt: skip

    launch_concat_gemm(plan, s, block_r, rows_bucket(m), n, k, rank, residual is None)
    return out
