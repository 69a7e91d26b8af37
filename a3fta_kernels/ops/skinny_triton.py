"""Triton kernels that pass once over rows: what `adapter` and `adapter_linear` share.

    rows_forward   a = x @ w_down.T + b_down, z = act(a) [modulated], y = residual + bias + z @ V.T
    rows_backward  da = (dy @ V) * (1 + gamma) * act'(a), dh = dy + da @ w_down, sums of da and dz
    weight_grad    X.T @ S and the column sums of X, where S is given or made from a

`adapter` is the case V = w_up, residual = h. A rank above `RANK_LIMIT` is cut into blocks by the
grid; then y and dh take a second kernel (gemm_triton).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_support import (
    AotKernel,
    Config,
    Launcher,
    activate,
    activate_slope,
    chip,
    config,
    dot,
    load_modulation,
    modulated,
    rank_block,
    rows_bucket,
    shared_limit,
)
from .activations import activation_code

RANK_LIMIT = 256


@triton.jit
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
    z = modulated(
        acc, gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R, ACT
    ).to(a_ptr.dtype.element_ty)
    if z_ptr is not None:
        tl.store(z_ptr + rows * R + offs_r[None, :], z, mask=mask)
    if y_ptr is not None:
        for n in range(0, N, BLOCK_C):
            offs_n = n + offs_c
            mask_n = offs_n < N
            v_ptrs = v_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
            v = tl.load(v_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            y = dot(z, v, tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32))
            mask = mask_m[:, None] & mask_n[None, :]
            if bias_ptr is not None:
                y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
            if residual_ptr is not None:
                residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
                y += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
            y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
            tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rows_backward_kernel(
    dy_ptr, v_ptr, a_ptr, w_down_ptr, gamma_ptr,
    da_ptr, da_sum_ptr, dgamma_ptr, dbeta_ptr, dh_ptr,
    rows_per_sample, tiles_per_sample, N, R, stride_dym, stride_dhm,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dy (M, N), v (N, R), a and da (M, R); dh (M, N) takes w_down (R, N).

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
    sums = pid.to(tl.int64) * R + offs_r
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + sums, tl.sum(dz * activate(a, ACT), axis=0), mask=mask_r)
    if dbeta_ptr is not None:
        tl.store(dbeta_ptr + sums, tl.sum(dz, axis=0), mask=mask_r)
    da = dz * activate_slope(a, ACT)
    if gamma_ptr is not None:
        da *= 1.0 + load_modulation(
            gamma_ptr, offs_m, mask_m, offs_r, mask_r, rows_per_sample, R
        )
    if da_sum_ptr is not None:
        tl.store(da_sum_ptr + sums, tl.sum(da, axis=0), mask=mask_r)
    da = da.to(a_ptr.dtype.element_ty)
    if da_ptr is not None:
        tl.store(da_ptr + rows * R + offs_r[None, :], da, mask=mask)
    if dh_ptr is not None:
        for n in range(0, N, BLOCK_C):
            mask_n = offs_n < N - n
            w_ptrs = w_down_ptr + offs_r[:, None] * N + (n + offs_n)[None, :]
            w = tl.load(w_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
            mask = mask_m[:, None] & mask_n[None, :]
            dh = dot(da, w, tl.load(dy_ptrs + n, mask=mask, other=0.0).to(tl.float32))
            dh_ptrs = dh_ptr + rows * stride_dhm + (n + offs_n)[None, :]
            tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_kernel(
    x_ptr, s_ptr, gamma_ptr, beta_ptr, out_ptr, x_sum_ptr,
    M, N, R, rows_per_sample, rows_per_split, stride_xm, stride_on, stride_or,
    FROM_A: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums over rows_per_split rows: out (splits, N, R) = X.T @ S, x_sum (splits, N).

    x (M, N); s (M, R) holds S, or with FROM_A the pre-activation a that S = z is made from.
    Programs: (N blocks, R blocks, splits).
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
        if FROM_A:
            z = modulated(
                s.to(tl.float32), gamma_ptr, beta_ptr, offs_m, mask_m, offs_r, mask_r,
                rows_per_sample, R, ACT,
            )  # fmt: skip
            s = z.to(s.dtype)
        acc = dot(tl.trans(x), s, acc)
        if x_sum_ptr is not None:
            x_sum += tl.sum(x.to(tl.float32), axis=0)

    out = out_ptr + split.to(tl.int64) * N * R
    out_ptrs = out + offs_n.to(tl.int64)[:, None] * stride_on + offs_r[None, :] * stride_or
    tl.store(out_ptrs, acc, mask=mask_n[:, None] & mask_r[None, :])
    if x_sum_ptr is not None and tl.program_id(1) == 0:
        tl.store(x_sum_ptr + split.to(tl.int64) * N + offs_n, x_sum, mask=mask_n)


def rows_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    """For rows_forward and rows_backward."""
    found = []
    for block_m, block_c, num_warps, num_stages in _ROWS_FP32 if itemsize == 4 else _ROWS:
        # both loops stage a tile of rows and a tile of a narrow weight
        shared = num_stages * itemsize * block_c * (block_m + block_r)
        accumulator = block_m * max(block_r, block_c) // (32 * num_warps)
        if shared <= shared_limit(capability) and accumulator <= 64:
            found.append(
                config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r)
            )
    return found


_ROWS = ((64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 4), (16, 64, 4, 4), (64, 32, 8, 3))
_ROWS_FP32 = ((32, 32, 4, 2), (16, 32, 4, 2))


def weight_grad_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_n, num_warps, num_stages in _GRAD_FP32 if itemsize == 4 else _GRAD:
        shared = num_stages * itemsize * block_m * (block_n + block_r)
        accumulator = block_n * block_r // (32 * num_warps)
        if shared <= shared_limit(capability) and accumulator <= 64:
            found.append(
                config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=block_r)
            )
    return found


_GRAD = ((64, 128, 4, 3), (64, 64, 4, 3), (32, 64, 4, 4), (64, 64, 8, 3), (32, 32, 4, 3))
_GRAD_FP32 = ((32, 64, 4, 2), (32, 32, 4, 2))

launch_rows_forward = Launcher(rows_forward_kernel, rows_configs)
launch_rows_backward = Launcher(rows_backward_kernel, rows_configs)
launch_weight_grad = Launcher(weight_grad_kernel, weight_grad_configs)

_SUMS = {"da_sum_ptr": None, "dgamma_ptr": None, "dbeta_ptr": None}
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
        variants={"dh": {"ACT": 2}, "da": {"ACT": 2, "dh_ptr": None, "w_down_ptr": None}},
    ),
    AotKernel(
        launch_weight_grad,
        pointers={"out_ptr": "fp32", "x_sum_ptr": "fp32"},
        variants={
            "from a": {"ACT": 2, "FROM_A": True},
            "given": {"ACT": 0, "FROM_A": False, "gamma_ptr": None, "beta_ptr": None,
                      "x_sum_ptr": None, "stride_or": 1},
        },
    ),
)  # fmt: skip


class Down(NamedTuple):
    """What rows_forward makes; `z` and `y` where asked for."""

    a: Tensor  # (M, R)
    z: Tensor | None  # (M, R)
    y: Tensor | None  # (M, N)


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
) -> Down:
    """a and, with v (N, R) of rank at most RANK_LIMIT, y; else a and z."""
    m, c = x.shape
    rank = w_down.shape[0]
    n = 0 if v is None else v.shape[0]
    a = x.new_empty(m, rank)
    z = x.new_empty(m, rank) if v is None else None
    y = None if v is None else x.new_empty(m, n)
    if m == 0:
        return Down(a, z, y)
    block_r = rank_block(rank, RANK_LIMIT)

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict]:
        grid = (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(rank, block_r))
        return grid, dict(
            x_ptr=x, w_down_ptr=w_down, v_ptr=v, b_down_ptr=dense(b_down), bias_ptr=dense(bias),
            gamma_ptr=dense(gamma), beta_ptr=dense(beta), residual_ptr=residual,
            a_ptr=a, z_ptr=z, y_ptr=y, M=m, C=c, N=n, R=rank,
            rows_per_sample=rows_per_sample(m, gamma, beta), stride_xm=x.stride(0),
            stride_residual_m=0 if residual is None else residual.stride(0), stride_ym=n,
            ACT=activation_code(activation),
        )  # fmt: skip

    launch_rows_forward(plan, x, block_r, rows_bucket(m), c, n)
    return Down(a, z, y)


class Up(NamedTuple):
    """What rows_backward makes; each where asked for. Sums are in fp32."""

    da: Tensor | None  # (M, R)
    da_sum: Tensor | None  # (R,)
    dgamma: Tensor | None  # (B, R)
    dbeta: Tensor | None  # (B, R)
    dh: Tensor | None  # (M, N)


def rows_backward(
    dy: Tensor,
    a: Tensor,
    v: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    activation: str,
    *,
    need_da: bool,
    need_sums: bool,
    w_down: Tensor | None = None,
) -> Up:
    """da and the sums over rows; with w_down (R, N) of rank at most RANK_LIMIT also dh."""
    m, n = dy.shape
    rank = a.shape[1]
    samples = next((x.shape[0] for x in (gamma, beta) if x is not None), 1)
    wide = dict(dtype=torch.float32, device=dy.device)
    da = dy.new_empty(m, rank) if need_da else None
    dh = None if w_down is None else dy.new_empty(m, n)
    asked = {
        "da_sum": need_sums,
        "dgamma": need_sums and gamma is not None,
        "dbeta": need_sums and beta is not None,
    }
    if m == 0:
        empty = {k: torch.zeros(samples, rank, **wide) if need else None for k, need in asked.items()}
        if need_sums:
            empty["da_sum"] = torch.zeros(rank, **wide)
        return Up(da, dh=dh, **empty)
    block_r = rank_block(rank, RANK_LIMIT)
    length = m // samples
    partial: dict[str, Tensor | None] = {}

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict]:
        tiles = triton.cdiv(length, meta["BLOCK_M"])
        for name, need in asked.items():
            partial[name] = torch.empty(samples, tiles, rank, **wide) if need else None
        grid = (samples * tiles, triton.cdiv(rank, block_r))
        return grid, dict(
            dy_ptr=dy, v_ptr=v, a_ptr=a, w_down_ptr=w_down, gamma_ptr=dense(gamma), da_ptr=da,
            da_sum_ptr=partial["da_sum"], dgamma_ptr=partial["dgamma"],
            dbeta_ptr=partial["dbeta"], dh_ptr=dh, rows_per_sample=length, tiles_per_sample=tiles,
            N=n, R=rank, stride_dym=dy.stride(0), stride_dhm=n, ACT=activation_code(activation),
        )  # fmt: skip

    launch_rows_backward(plan, dy, block_r, rows_bucket(m), n, samples, dh is None)
    return Up(
        da,
        da_sum=None if partial["da_sum"] is None else partial["da_sum"].sum((0, 1)),
        dgamma=None if partial["dgamma"] is None else partial["dgamma"].sum(1),
        dbeta=None if partial["dbeta"] is None else partial["dbeta"].sum(1),
        dh=dh,
    )


def weight_grad(
    x: Tensor,
    s: Tensor,
    *,
    transposed: bool = False,
    from_a: bool = False,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    activation: str = "identity",
) -> tuple[Tensor, Tensor | None]:
    """X.T @ S (N, R), or its transpose, in fp32; with `from_a` S = z of a = s, and sum(X) (N,)."""
    m, n = x.shape
    rank = s.shape[1]
    wide = dict(dtype=torch.float32, device=x.device)
    shape = (rank, n) if transposed else (n, rank)
    if m == 0:
        return torch.zeros(shape, **wide), torch.zeros(n, **wide) if from_a else None
    block_r = rank_block(rank, RANK_LIMIT)
    partial: dict[str, Tensor | None] = {}

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict]:
        blocks = triton.cdiv(n, meta["BLOCK_N"]) * triton.cdiv(rank, block_r)
        # two programs a processor, each with at least four steps of its loop
        wanted = max(1, 2 * chip(x.device).processors // blocks)
        rows = triton.cdiv(triton.cdiv(m, wanted), meta["BLOCK_M"]) * meta["BLOCK_M"]
        rows = max(rows, min(4 * meta["BLOCK_M"], m))
        splits = triton.cdiv(m, rows)
        partial["out"] = torch.empty(splits, *shape, **wide)
        partial["x_sum"] = torch.empty(splits, n, **wide) if from_a else None
        grid = (triton.cdiv(n, meta["BLOCK_N"]), triton.cdiv(rank, block_r), splits)
        return grid, dict(
            x_ptr=x, s_ptr=s, gamma_ptr=dense(gamma), beta_ptr=dense(beta),
            out_ptr=partial["out"], x_sum_ptr=partial["x_sum"], M=m, N=n, R=rank,
            rows_per_sample=rows_per_sample(m, gamma, beta), rows_per_split=rows,
            stride_xm=x.stride(0), stride_on=1 if transposed else rank,
            stride_or=n if transposed else 1, FROM_A=from_a, ACT=activation_code(activation),
        )  # fmt: skip

    launch_weight_grad(plan, x, block_r, rows_bucket(m), n, from_a)
    return _total(partial["out"]), _total(partial["x_sum"])


def _total(partial: Tensor | None) -> Tensor | None:
    if partial is None or partial.shape[0] == 1:
        return None if partial is None else partial[0]
    return partial.sum(0)


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rows_per_sample(m: int, gamma: Tensor | None, beta: Tensor | None) -> int:
    return next((m // x.shape[0] for x in (gamma, beta) if x is not None), m)
