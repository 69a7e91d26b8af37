# mypy: allow-untyped-defs
"""The Triton kernel for weight gradients: a sum over rows, in parts, added in a fixed order."""

from __future__ import annotations

import torch
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
    dot,
    rank_block,
    rows_bucket,
    shared_limit,
)
from .rule import AdapterGrads
from .skinny_triton import RowGrads
from .sum_triton import split_rows, totals


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def weight_grad_kernel(
    x_ptr, s_ptr, out_ptr, x_sum_ptr,
    M, N, R, rows_per_split, stride_xm, stride_on, stride_or,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums over rows_per_split rows: out (splits, N, R) = x.T @ s, x_sum (splits, N).

    x (M, N); s (M, R). Programs: (N blocks, R blocks, splits).
    """
    split = tl.program_id(2)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)

    acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    x_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = offs_m.to(tl.int64)[:, None]
        x_ptrs = x_ptr + rows * stride_xm + offs_n[None, :]
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        s_ptrs = s_ptr + rows * R + offs_r[None, :]
        s = tl.load(s_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        acc = dot(tl.trans(x), s, acc)
        if x_sum_ptr is not None:
            x_sum += tl.sum(x.to(tl.float32), axis=0)

    out = out_ptr + split.to(tl.int64) * N * R
    out_ptrs = out + offs_n.to(tl.int64)[:, None] * stride_on + offs_r[None, :] * stride_or
    tl.store(out_ptrs, acc, mask=mask_n[:, None] & mask_r[None, :])
    if x_sum_ptr is not None and tl.program_id(1) == 0:
        tl.store(x_sum_ptr + split.to(tl.int64) * N + offs_n, x_sum, mask=mask_n)


# BLOCK_M, BLOCK_N, num_warps, num_stages
_GRAD = ((64, 64, 4, 4), (64, 128, 8, 3), (32, 64, 4, 4), (64, 64, 8, 3))
_GRAD_FP32 = ((16, 64, 8, 2), (16, 32, 4, 2))


def weight_grad_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    if itemsize == 4:
        block_r = min(block_r, 64)
    for block_m, block_n, num_warps, num_stages in _GRAD_FP32 if itemsize == 4 else _GRAD:
        shared = num_stages * itemsize * block_m * (block_n + block_r)
        accumulator = block_n * block_r // (32 * num_warps)
        if shared <= shared_limit(capability) and accumulator <= 32:
            found.append(
                config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r)
            )
    return found


launch_weight_grad = Launcher(weight_grad_kernel, weight_grad_configs)

AOT_KERNELS = (
    AotKernel(
        launch_weight_grad,
        pointers={"out_ptr": "fp32", "x_sum_ptr": "fp32"},
        variants={"x_sum": {"stride_on": 1}, "": {"x_sum_ptr": None, "stride_or": 1}},
    ),
)  # fmt: skip


def adapter_grads(dh: Tensor | None, h: Tensor, dy: Tensor, row_grads: RowGrads) -> AdapterGrads:
    """All gradients, from those of the rows: dh, and `row_grads` with z and its sums."""
    assert row_grads.z is not None
    down, _ = weight_grad(h, row_grads.da, transposed=True)
    g_up, dy_sum = weight_grad(dy, row_grads.z, need_sum=True)
    sums = totals(down, g_up, row_grads.da_sum, dy_sum, axis=0)
    return AdapterGrads(dh, *sums, *totals(row_grads.dgamma, row_grads.dbeta, axis=1))


def weight_grad(
    x: Tensor, s: Tensor, *, transposed: bool = False, need_sum: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x.T @ s (parts, N, R), or its transpose, in fp32, still to be summed over its parts; with
    `need_sum` the sums of x (parts, N).
    """
    m, n = x.shape
    rank = s.shape[1]
    shape = (rank, n) if transposed else (n, rank)
    partial: dict[str, Tensor] = {}

    def allot(splits: int) -> None:
        partial["out"] = x.new_empty((splits, *shape), dtype=torch.float32)
        if need_sum:
            partial["x_sum"] = x.new_empty((splits, n), dtype=torch.float32)

    block_r = rank_block(rank)

    def plan(meta: dict[str, int]) -> Call:
        tiles_n, tiles_r = cdiv(n, meta["BLOCK_N"]), cdiv(rank, meta["BLOCK_R"])
        rows = split_rows(m, meta["BLOCK_M"], tiles_n * tiles_r, x.device)
        splits = cdiv(m, rows)
        allot(splits)
        return (tiles_n, tiles_r, splits), dict(
            x_ptr=x, s_ptr=s, out_ptr=partial["out"], x_sum_ptr=partial.get("x_sum"),
            M=m, N=n, R=rank, rows_per_split=rows, stride_xm=x.stride(0),
            stride_on=1 if transposed else rank, stride_or=n if transposed else 1,
        )  # fmt: skip

    if m == 0:
        allot(0)
    else:
        launch_weight_grad(plan, x, block_r, rows_bucket(m), n, need_sum)
    return partial["out"], partial.get("x_sum")
