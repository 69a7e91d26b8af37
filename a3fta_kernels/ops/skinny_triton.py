# mypy: allow-untyped-defs
"""Triton kernels that pass once over rows: what `adapter` and `adapter_linear` share.

    rows_forward   a = x @ w_down.T + b_down, z = act(a) [modulated], y = residual + bias + z @ V.T
    rows_backward  da = (dy @ V) * (1 + gamma) * act'(a), dh = dy + da @ w_down, sums of da and dz

`adapter` is the case V = w_up, residual = h, whose second read comes out of the cache, or a base
apart. A rank above MAX_BLOCK_R is cut into blocks by the grid; then y and dh take a second kernel
(gemm_triton).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    activate,
    activate_slope,
    cdiv,
    config,
    dot,
    load_modulation,
    modulated,
    rank_block,
    rows_bucket,
    rows_per_sample,
    shared_limit,
)
from .activations import activation_code
from .rule import contiguous


@triton.jit
def up_tile(
    y, z, v_ptr, bias_ptr, scale, y_ptr, rows, mask_m, offs_n, offs_r, mask_r, N, R, stride_ym
):  # fmt: skip
    """Stores y + z @ v.T + scale * bias at the columns offs_n."""
    mask_n = offs_n < N
    v_ptrs = v_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
    y = dot(z, tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0), y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :] * scale
    y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def rows_forward_kernel(
    x_ptr, w_down_ptr, v_ptr, b_down_ptr, bias_ptr, gamma_ptr, beta_ptr, residual_ptr,
    a_ptr, z_ptr, y_ptr,
    M, C, N, R, rows_per_sample, stride_xm, stride_residual_m, stride_ym,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """x (M, C), w_down (R, C), v (N, R), residual and y (M, N), a and z (M, R).

    One program per (BLOCK_M rows, BLOCK_R ranks); y only where one block holds all ranks.
    """
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask_r = offs_r < R
    rows = offs_m.to(tl.int64)[:, None]

    x_ptrs = x_ptr + rows * stride_xm + offs_c[None, :]
    w_ptrs = w_down_ptr + offs_r[None, :] * C + offs_c[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        mask_c = offs_c < C - c
        x = tl.load(x_ptrs + c, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        w = tl.load(w_ptrs + c, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        acc = dot(x, w, acc)
    if b_down_ptr is not None:
        acc += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]

    mask = mask_m[:, None] & mask_r[None, :]
    tl.store(a_ptr + rows * R + offs_r[None, :], acc.to(a_ptr.dtype.element_ty), mask=mask)
    z = modulated(acc, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT)
    # an infinite x times the zeros beyond the rank is NaN there
    z = tl.where(mask_r[None, :], z, 0.0).to(a_ptr.dtype.element_ty)
    if z_ptr is not None:
        tl.store(z_ptr + rows * R + offs_r[None, :], z, mask=mask)
    if y_ptr is not None:
        for n in range(0, N, BLOCK_C):
            offs_n = n + offs_c
            y = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
            if residual_ptr is not None:
                residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
                mask_y = mask_m[:, None] & (offs_n < N)[None, :]
                y += tl.load(residual_ptrs, mask=mask_y, other=0.0).to(tl.float32)
            up_tile(
                y, z, v_ptr, bias_ptr, 1.0, y_ptr, rows, mask_m, offs_n, offs_r, mask_r, N, R,
                stride_ym,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_sample", "tiles_per_sample"])
def rows_backward_kernel(
    dy_ptr, v_ptr, a_ptr, w_down_ptr, gamma_ptr, beta_ptr,
    da_ptr, z_ptr, da_sum_ptr, dgamma_ptr, dbeta_ptr, dh_ptr,
    rows_per_sample, tiles_per_sample, N, R, stride_dym, stride_dhm,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dy (M, N), v (N, R), a, da and z (M, R); dh (M, N) takes w_down (R, N).

    One program per (BLOCK_M rows of one sample, BLOCK_R ranks): its row of the partial sums
    da_sum, dgamma, dbeta (programs, R) then belongs to one sample. dh only where one block holds
    all ranks.
    """
    pid = tl.program_id(0)
    sample = pid // tiles_per_sample
    offs_l = (pid % tiles_per_sample) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tl.arange(0, BLOCK_C)
    mask_m = offs_l < rows_per_sample
    mask_r = offs_r < R
    offs_m = sample * rows_per_sample + offs_l
    rows = offs_m.to(tl.int64)[:, None]

    dy_ptrs = dy_ptr + rows * stride_dym + offs_n[None, :]
    dz = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for n in range(0, N, BLOCK_C):
        mask_n = offs_n < N - n
        dy = tl.load(dy_ptrs + n, mask=mask_m[:, None] & mask_n[None, :], other=0.0)
        v_ptrs = v_ptr + (n + offs_n).to(tl.int64)[:, None] * R + offs_r[None, :]
        v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_r[None, :], other=0.0)
        dz = dot(dy, v, dz)

    mask = mask_m[:, None] & mask_r[None, :]
    a = tl.load(a_ptr + rows * R + offs_r[None, :], mask=mask, other=0.0).to(tl.float32)
    if z_ptr is not None:
        z = modulated(
            a, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT
        )
        tl.store(z_ptr + rows * R + offs_r[None, :], z.to(a_ptr.dtype.element_ty), mask=mask)
    sums = pid.to(tl.int64) * R + offs_r
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + sums, tl.sum(dz * activate(a, ACT), axis=0), mask=mask_r)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + sums, tl.sum(dz, axis=0), mask=mask_r)
    da = dz * activate_slope(a, ACT)
    if gamma_ptr is not None:
        da *= 1.0 + load_modulation(gamma_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R)
    if da_sum_ptr is not None:
        tl.store(da_sum_ptr + sums, tl.sum(da, axis=0), mask=mask_r)
    da = da.to(a_ptr.dtype.element_ty)
    tl.store(da_ptr + rows * R + offs_r[None, :], da, mask=mask)
    if dh_ptr is not None:
        for n in range(0, N, BLOCK_C):
            mask_n = offs_n < N - n
            w_ptrs = w_down_ptr + offs_r[:, None] * N + (n + offs_n)[None, :]
            w = tl.load(w_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            mask_dh = mask_m[:, None] & mask_n[None, :]
            dh = dot(da, w, tl.load(dy_ptrs + n, mask=mask_dh, other=0.0).to(tl.float32))
            dh_ptrs = dh_ptr + rows * stride_dhm + (n + offs_n)[None, :]
            tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask_dh)


# BLOCK_M, BLOCK_C, num_warps, num_stages
_ROWS = ((64, 128, 8, 3), (32, 128, 4, 3), (32, 64, 4, 4))
_ROWS_FP32 = ((32, 32, 8, 2), (16, 32, 4, 2))


def rows_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_c, num_warps, num_stages in _ROWS_FP32 if itemsize == 4 else _ROWS:
        # both loops stage a tile of rows and a tile of a narrow weight
        shared = num_stages * itemsize * block_c * (block_m + block_r)
        accumulator = block_m * max(block_r, block_c) // (32 * num_warps)
        # a wide tile beside many ranks takes registers until some spill
        fits = accumulator <= 32 and block_c + block_r <= 192
        if fits and shared <= shared_limit(capability):
            found.append(
                config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r)
            )
    return found


launch_rows_forward = Launcher(rows_forward_kernel, rows_configs)
launch_rows_backward = Launcher(rows_backward_kernel, rows_configs)

AOT_KERNELS = (
    AotKernel(
        launch_rows_forward,
        pointers={"bias_ptr": "fp32"},
        variants={
            "y": {"ACT": 2, "z_ptr": None},
            "z": {"ACT": 2, "y_ptr": None, "v_ptr": None, "bias_ptr": None, "residual_ptr": None},
        },
    ),
    AotKernel(
        launch_rows_backward,
        pointers={"da_sum_ptr": "fp32", "dgamma_ptr": "fp32", "dbeta_ptr": "fp32"},
        variants={
            "dh": {"ACT": 2},
            "da": {"ACT": 2, "dh_ptr": None, "w_down_ptr": None, "z_ptr": None, "beta_ptr": None},
        },
    ),
)


def rows_forward(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    *,
    v: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(a, z); with v (N, R), of rank at most MAX_BLOCK_R, (a, residual + bias + z @ v.T)."""
    m, c = x.shape
    rank = w_down.shape[0]
    n = 0 if v is None else v.shape[0]
    a = x.new_empty(m, rank)
    out = x.new_empty(m, rank if v is None else n)
    if m == 0:
        return a, out
    block_r = rank_block(rank)

    def plan(meta: dict[str, int]) -> Call:
        grid = (cdiv(m, meta["BLOCK_M"]), cdiv(rank, block_r))
        return grid, dict(
            x_ptr=x, w_down_ptr=w_down, v_ptr=v, b_down_ptr=contiguous(b_down),
            bias_ptr=contiguous(bias), gamma_ptr=contiguous(gamma), beta_ptr=contiguous(beta),
            residual_ptr=residual, a_ptr=a,
            z_ptr=out if v is None else None, y_ptr=None if v is None else out,
            M=m, C=c, N=n, R=rank, rows_per_sample=rows_per_sample(m, gamma, beta),
            stride_xm=x.stride(0),
            stride_residual_m=0 if residual is None else residual.stride(0), stride_ym=n,
            ACT=activation_code(activation),
        )  # fmt: skip

    launch_rows_forward(plan, x, block_r, rows_bucket(m), c, n, residual is x)
    return a, out


class RowGrads(NamedTuple):
    """What rows_backward makes, all but da where asked for. Sums over rows are in fp32, and in
    parts that sum_triton adds.
    """

    da: Tensor  # (M, R)
    dh: Tensor | None  # (M, N)
    z: Tensor | None = None  # (M, R)
    da_sum: Tensor | None = None  # (parts, R)
    dgamma: Tensor | None = None  # (B, parts, R)
    dbeta: Tensor | None = None  # (B, parts, R)


def rows_backward(
    dy: Tensor,
    a: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    *,
    need_sums: bool,
    w_down: Tensor | None = None,
) -> RowGrads:
    """da; with `need_sums` z, made anew from a, and sums over rows, in parts; with w_down (R, N),
    of rank at most MAX_BLOCK_R, dh.
    """
    m, n = dy.shape
    rank = a.shape[1]
    samples = next((x.shape[0] for x in (gamma, beta) if x is not None), 1)
    da = dy.new_empty(m, rank)
    z = dy.new_empty(m, rank) if need_sums else None
    dh = None if w_down is None else dy.new_empty(m, n)
    need = {
        "da_sum": need_sums,
        "dgamma": need_sums and gamma is not None,
        "dbeta": need_sums and beta is not None,
    }
    partial: dict[str, Tensor | None] = {}

    def allot(tiles: int) -> None:
        shape = (samples, tiles, rank)
        for name, asked in need.items():
            partial[name] = dy.new_empty(shape, dtype=torch.float32) if asked else None

    block_r = rank_block(rank)
    length = m // samples if m else 0

    def plan(meta: dict[str, int]) -> Call:
        tiles = cdiv(length, meta["BLOCK_M"])
        allot(tiles)
        grid = (samples * tiles, cdiv(rank, block_r))
        return grid, dict(
            dy_ptr=dy, v_ptr=v, a_ptr=a, w_down_ptr=w_down, gamma_ptr=contiguous(gamma),
            beta_ptr=contiguous(beta) if need_sums else None, da_ptr=da, z_ptr=z,
            da_sum_ptr=partial["da_sum"], dgamma_ptr=partial["dgamma"],
            dbeta_ptr=partial["dbeta"], dh_ptr=dh, rows_per_sample=length, tiles_per_sample=tiles,
            N=n, R=rank, stride_dym=dy.stride(0), stride_dhm=n, ACT=activation_code(activation),
        )  # fmt: skip

    if m == 0:
        allot(0)
    else:
        launch_rows_backward(plan, dy, block_r, rows_bucket(m), n, samples, dh is None, need_sums)
    da_sum, dgamma, dbeta = (partial[name] for name in need)
    return RowGrads(da, dh, z, None if da_sum is None else da_sum.view(-1, rank), dgamma, dbeta)
