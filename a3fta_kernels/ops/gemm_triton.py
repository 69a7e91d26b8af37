# mypy: allow-untyped-defs
"""One GEMM whose K loop runs over two pairs of matrices: nothing is concatenated in memory.

Two kernels of the same sum. On sm_90 and newer, where rows begin at multiples of 16 bytes,
tensor descriptors (TMA) load and store the tiles: the addresses then take no registers, which is
what 128 x 256 tiles need. Elsewhere pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    cdiv,
    config,
    descriptor,
    descriptors_fit,
    dot,
    grouped_tile,
    rank_block,
    rows_bucket,
    shared_limit,
)
from .rule import contiguous

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
    # the narrow product comes first, so that beside the slice its 0 * NaN can be put aside
    acc = tl.where(mask_t[None, :], acc, 0.0)

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

    mask = mask_m[:, None] & mask_n[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + rows * stride_om + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def concat_gemm_tma_kernel(
    x_desc, w_desc, s_desc, t_desc, bias_ptr, residual_desc, out_desc,
    M, N, K, R, start, length,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The same by tensor descriptors, which read zeros beyond an edge and write nothing there.

    x (M, K), s (M, R); w (K, N) and t (R, length), TRANSPOSED w (N, K) and t (length, R).
    """
    pid_m, pid_n = grouped_tile(M, N, BLOCK_M, BLOCK_N)
    first_m = pid_m * BLOCK_M
    first_n = pid_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # a tile beside the slice has no second product
    reaches = (first_n < start + length) & (first_n + BLOCK_N > start)
    for r in range(0, tl.where(reaches, R, 0), BLOCK_R):
        s = s_desc.load([first_m, r])
        if TRANSPOSED:
            t = tl.trans(t_desc.load([first_n - start, r]))
        else:
            t = t_desc.load([r, first_n - start])
        acc = dot(s, t, acc)
    columns = first_n - start + tl.arange(0, BLOCK_N)
    acc = tl.where(((columns >= 0) & (columns < length))[None, :], acc, 0.0)

    for k in range(0, K, BLOCK_K):
        x = x_desc.load([first_m, k])
        w = tl.trans(w_desc.load([first_n, k])) if TRANSPOSED else w_desc.load([k, first_n])
        acc = dot(x, w, acc)

    if bias_ptr is not None:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if residual_desc is not None:
        acc += residual_desc.load([first_m, first_n]).to(tl.float32)
    out_desc.store([first_m, first_n], acc.to(out_desc.dtype))


# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_HALF = (
    (128, 128, 32, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 64, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (64, 128, 32, 4, 3),
)
_HALF_ODD = (_HALF[0], _HALF[3])
_FP32 = ((64, 32, 16, 8, 2), (32, 32, 16, 4, 2))


def concat_gemm_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    # where descriptors serve, pointers are left with the odd sizes
    tiles = _FP32 if itemsize == 4 else _HALF if capability < 90 else _HALF_ODD
    for block_m, block_n, block_k, num_warps, num_stages in tiles:
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


launch_concat_gemm = Launcher(concat_gemm_kernel, concat_gemm_configs)

# BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages
_TMA = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
)


def concat_gemm_tma_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_n, block_k, num_warps, num_stages in _TMA:
        shared = num_stages * itemsize * max(block_k, block_r) * (block_m + block_n)
        accumulator = block_m * block_n // (32 * num_warps)
        # but for wgmma's, an epilogue of 128 values a thread leaves too few registers
        fits = accumulator <= (128 if capability == 90 else 64)
        if shared <= shared_limit(capability) and fits:
            found.append(
                config(
                    num_warps, num_stages,
                    BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r,
                )
            )  # fmt: skip
    return found


launch_concat_gemm_tma = Launcher(concat_gemm_tma_kernel, concat_gemm_tma_configs)

_TMA_ROWS = {
    "x_desc": ("BLOCK_M", "BLOCK_K"),
    "s_desc": ("BLOCK_M", "BLOCK_R"),
    "out_desc": ("BLOCK_M", "BLOCK_N"),
}

AOT_KERNELS = (
    AotKernel(
        launch_concat_gemm,
        pointers={"bias_ptr": "fp32"},
        variants={
            "forward": {"stride_wk": 1, "stride_tr": 1},
            "backward": {"stride_wn": 1, "stride_tn": 1, "bias_ptr": None, "residual_ptr": None},
            "second only": {"x_ptr": None, "w_ptr": None, "stride_tr": 1},
        },
        fixed_blocks=(16, 64),
    ),
    AotKernel(
        launch_concat_gemm_tma,
        pointers={"bias_ptr": "fp32"},
        variants={
            "forward": {
                "TRANSPOSED": True,
                "w_desc": ("BLOCK_N", "BLOCK_K"), "t_desc": ("BLOCK_N", "BLOCK_R"),
                "residual_desc": ("BLOCK_M", "BLOCK_N"), **_TMA_ROWS,
            },
            "backward": {
                "TRANSPOSED": False,
                "w_desc": ("BLOCK_K", "BLOCK_N"), "t_desc": ("BLOCK_R", "BLOCK_N"),
                "residual_desc": None, "bias_ptr": None, **_TMA_ROWS,
            },
        },
        fixed_blocks=(16, 64),
        targets=(90, 100, 120),
        dtypes=("bf16", "fp16"),
    ),
)  # fmt: skip


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
    if x is not None and w is not None and start % 8 == 0:
        transposed = w.stride(0) == 1
        rows = (w.t(), t.t()) if transposed else (w, t)
        if descriptors_fit(x.device, x, *rows, s, residual, out):
            _concat_gemm_tma(x, *rows, s, bias, residual, out, start, block_r, transposed)
            return out
    k = 0 if x is None else x.shape[1]

    def plan(meta: dict[str, int]) -> Call:
        grid = (cdiv(m, meta["BLOCK_M"]) * cdiv(n, meta["BLOCK_N"]),)
        return grid, dict(
            x_ptr=x, w_ptr=w, s_ptr=s, t_ptr=t, bias_ptr=contiguous(bias), residual_ptr=residual,
            out_ptr=out, M=m, N=n, K=k, R=rank, start=start, length=length,
            stride_xm=0 if x is None else x.stride(0), stride_wk=0 if w is None else w.stride(0),
            stride_wn=0 if w is None else w.stride(1), stride_tr=t.stride(0),
            stride_tn=t.stride(1), stride_residual_m=0 if residual is None else residual.stride(0),
            stride_om=n,
        )  # fmt: skip

    # a weight and its transpose are read in another order
    rows_first = w is not None and w.stride(0) == 1
    launch_concat_gemm(plan, s, block_r, rows_bucket(m), n, k, rank, rows_first, residual is None)
    return out


def _concat_gemm_tma(
    x: Tensor,
    w: Tensor,
    t: Tensor,
    s: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    start: int,
    block_r: int,
    transposed: bool,
) -> None:
    m, n = out.shape
    k = x.shape[1]
    rank = s.shape[1]

    def plan(meta: dict[str, int]) -> Call:
        block_m, block_n, block_k = (meta[f"BLOCK_{axis}"] for axis in "MNK")
        grid = (cdiv(m, block_m) * cdiv(n, block_n),)
        wide, narrow = (block_k, block_n), (block_r, block_n)
        return grid, dict(
            x_desc=descriptor(x, block_m, block_k), s_desc=descriptor(s, block_m, block_r),
            w_desc=descriptor(w, *(wide[::-1] if transposed else wide)),
            t_desc=descriptor(t, *(narrow[::-1] if transposed else narrow)),
            bias_ptr=contiguous(bias), residual_desc=descriptor(residual, block_m, block_n),
            out_desc=descriptor(out, block_m, block_n), M=m, N=n, K=k, R=rank, start=start,
            length=t.shape[0 if transposed else 1], TRANSPOSED=transposed,
        )  # fmt: skip

    launch_concat_gemm_tma(
        plan, s, block_r, rows_bucket(m), n, k, rank, transposed, residual is None
    )
