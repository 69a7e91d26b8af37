# mypy: allow-untyped-defs
"""The backward of short-key attention, from dy @ weight and da to dq, dk and dv.

    dh = dy @ weight + da @ w_down, formed in registers, one head at a time
    ds = p * (dp - delta),  dp = dh @ v.T,  delta = sum over keys of p * dp
    dq = ds @ k,  dk = ds.T @ q,  dv = p.T @ dh

All keys of a row are at hand, so delta needs neither h nor a pass of its own. dq has a program for
a block of rows and all heads, as the forward. dk and dv, only where asked for, have one for a block
of keys, a head and a span of rows; it takes the softmax's statistics from the kernel for dq, and
spans are added in a fixed order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Config,
    Launcher,
    chip,
    config,
    rank_block,
    rows_bucket,
)
from .layout import RANK_LIMIT
from .tiles_triton import (
    Blocks,
    blocks,
    cast,
    load_keys,
    load_rows,
    mask_strides,
    masked_scores,
    outer,
    probabilities,
    store_rows,
    times,
    zeros,
)


@triton.jit(do_not_specialize=["M"])
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dh_ptr, da_ptr, w_down_ptr, dq_ptr, stats_ptr,
    M, N, H, R, stride_qb, stride_qm, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N_1: tl.constexpr, BLOCK_N_2: tl.constexpr,
    BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q (B, M, C), k and v (B, N, C); dh (B * M, C) without its part from da (B * M, R);
    dq (B * M, C). stats (B, H, 3, M): top and norm of `probabilities`, and delta.

    One program per BLOCK_M rows of one sample.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_m = offs_m.to(tl.int64)
    rows = sample * M + offs_m
    offs_r = tl.arange(0, BLOCK_R)
    C = H * D
    dtype: tl.constexpr = dq_ptr.dtype.element_ty

    da_ptrs = da_ptr + rows[:, None] * R + offs_r[None, :]
    da = tl.load(da_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)
    for head in range(H):
        c = head * D
        q_head = q_ptr + sample * stride_qb + c
        k_head = k_ptr + sample * stride_kb + c
        v_head = v_ptr + sample * stride_vb + c
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head += sample * stride_mask_b + head * stride_mask_h
        q = load_rows(q_head, offs_m, mask_m, stride_qm, D, BLOCK_D_1, BLOCK_D_2)
        k = load_keys(k_head, N, stride_kn, D, BLOCK_N_1, BLOCK_N_2, BLOCK_D_1, BLOCK_D_2)
        v = load_keys(v_head, N, stride_vn, D, BLOCK_N_1, BLOCK_N_2, BLOCK_D_1, BLOCK_D_2)
        dh = load_rows(dh_ptr + c, rows, mask_m, C, D, BLOCK_D_1, BLOCK_D_2)
        down = load_rows(w_down_ptr + c, offs_r, offs_r < R, C, D, BLOCK_D_1, BLOCK_D_2)
        dh = cast(times(da, down, cast(dh, tl.float32)), dtype)

        p, top, norm = probabilities(
            q, k, mask_head, offs_m, mask_m, N, stride_mask_m, stride_mask_n, SCALE, PER_QUERY
        )
        p = cast(p, tl.float32, norm[:, None])
        dp = (outer(dh, v[0], tl.zeros((BLOCK_M, BLOCK_N_1), dtype=tl.float32)),)
        delta = tl.sum(p[0] * dp[0], axis=1)
        if BLOCK_N_2 > 0:
            dp = (dp[0], outer(dh, v[1], tl.zeros((BLOCK_M, BLOCK_N_2), dtype=tl.float32)))
            delta += tl.sum(p[1] * dp[1], axis=1)
        ds = (p[0] * (dp[0] - delta[:, None])).to(dtype)
        dq = times(ds, k[0], zeros(BLOCK_M, BLOCK_D_1, BLOCK_D_2))
        if BLOCK_N_2 > 0:
            ds_2 = (p[1] * (dp[1] - delta[:, None])).to(dtype)
            dq = times(ds_2, k[1], dq)
        dq = cast(dq, dtype, SCALE)
        store_rows(dq_ptr + c, dq, rows, mask_m, C, D, BLOCK_D_1, BLOCK_D_2)
        if stats_ptr is not None:
            stats = stats_ptr + (sample * H + head) * 3 * M + offs_m
            tl.store(stats, top, mask=mask_m)
            tl.store(stats + M, norm, mask=mask_m)
            tl.store(stats + 2 * M, delta, mask=mask_m)


@triton.jit(do_not_specialize=["M", "rows_per_split", "splits"])
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dh_ptr, da_ptr, w_down_ptr, stats_ptr, dk_ptr, dv_ptr,
    M, N, H, R, rows_per_split, splits,
    stride_qb, stride_qm, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Partial sums over rows_per_split rows of a sample: dk, dv (splits, B, N, C).

    The other tensors as in query_grad_kernel. Programs: (N blocks, H, B * splits).
    """
    head = tl.program_id(1)
    sample = (tl.program_id(2) // splits).to(tl.int64)
    split = (tl.program_id(2) % splits).to(tl.int64)
    batch = tl.num_programs(2) // splits
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_r = tl.arange(0, BLOCK_R)
    c = head * D
    C = H * D
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    mask_head = mask_ptr
    if mask_ptr is not None:
        mask_head += sample * stride_mask_b + head * stride_mask_h

    k_head = k_ptr + sample * stride_kb + c
    v_head = v_ptr + sample * stride_vb + c
    k = load_rows(k_head, offs_n, mask_n, stride_kn, D, BLOCK_D_1, BLOCK_D_2)
    v = load_rows(v_head, offs_n, mask_n, stride_vn, D, BLOCK_D_1, BLOCK_D_2)
    down = load_rows(w_down_ptr + c, offs_r, offs_r < R, C, D, BLOCK_D_1, BLOCK_D_2)
    dk = zeros(BLOCK_N, BLOCK_D_1, BLOCK_D_2)
    dv = zeros(BLOCK_N, BLOCK_D_1, BLOCK_D_2)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, M)
    for m in range(first, last, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < last
        rows = sample * M + offs_m
        q_head = q_ptr + sample * stride_qb + c
        q = load_rows(q_head, offs_m, mask_m, stride_qm, D, BLOCK_D_1, BLOCK_D_2)
        dh = load_rows(dh_ptr + c, rows, mask_m, C, D, BLOCK_D_1, BLOCK_D_2)
        da_ptrs = da_ptr + rows[:, None] * R + offs_r[None, :]
        da = tl.load(da_ptrs, mask=mask_m[:, None] & (offs_r < R)[None, :], other=0.0)
        dh = cast(times(da, down, cast(dh, tl.float32)), dtype)
        stats = stats_ptr + (sample * H + head) * 3 * M + offs_m
        top = tl.load(stats, mask=mask_m, other=0.0)
        norm = tl.load(stats + M, mask=mask_m, other=0.0)
        delta = tl.load(stats + 2 * M, mask=mask_m, other=0.0)

        s = masked_scores(
            q, k, mask_head, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n, SCALE,
            PER_QUERY,
        )  # fmt: skip
        p = tl.exp(s - top[:, None]) * norm[:, None]
        dp = outer(dh, v, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32))
        ds = p * (dp - delta[:, None])
        dv = times(tl.trans(p.to(dtype)), dh, dv)
        dk = times(tl.trans(ds.to(dtype)), q, dk)

    out = (split * batch + sample) * N * C + c
    dk = cast(dk, tl.float32, SCALE)
    store_rows(dk_ptr + out, dk, offs_n, mask_n, C, D, BLOCK_D_1, BLOCK_D_2)
    store_rows(dv_ptr + out, dv, offs_n, mask_n, C, D, BLOCK_D_1, BLOCK_D_2)


def query_grad_configs(
    head: Blocks, keys: Blocks, itemsize: int, block_r: int, capability: int
) -> list[Config]:
    fixed = dict(
        BLOCK_N_1=keys.first, BLOCK_N_2=keys.second, BLOCK_D_1=head.first, BLOCK_D_2=head.second,
        BLOCK_R=block_r,
    )  # fmt: skip
    sizes = ((32, 4, 1), (16, 4, 1)) if itemsize == 4 else ((64, 4, 2), (32, 4, 2), (16, 4, 1))
    return [config(w, s, BLOCK_M=m, **fixed) for m, w, s in sizes]


def key_grad_configs(
    head: Blocks, itemsize: int, block_r: int, capability: int
) -> list[Config]:
    fixed = dict(BLOCK_D_1=head.first, BLOCK_D_2=head.second, BLOCK_R=block_r)
    sizes = ((16, 16, 4, 1),) if itemsize == 4 else ((64, 64, 4, 1), (32, 32, 4, 1))
    return [config(w, s, BLOCK_M=m, BLOCK_N=n, **fixed) for m, n, w, s in sizes]


@functools.cache
def launch_query_grad(head: Blocks, keys: Blocks) -> Launcher:
    return Launcher(query_grad_kernel, functools.partial(query_grad_configs, head, keys))


@functools.cache
def launch_key_grad(head: Blocks) -> Launcher:
    return Launcher(key_grad_kernel, functools.partial(key_grad_configs, head))


AOT_KERNELS = ()


def attention_grads(
    dh: Tensor,
    da: Tensor,
    w_down: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    heads: int,
    attention_scale: float,
    need_kv: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dq (B, M, C) and, with need_kv, dk and dv (B, N, C) in fp32.

    dh (B * M, C) is dy @ weight; da (B * M, R) and w_down (R, C) bring the adapter's part.
    """
    batch, length, channels = q.shape
    keys = k.shape[1]
    rank = da.shape[1]
    block_r = rank_block(rank, RANK_LIMIT)
    head = blocks(channels // heads)
    dq = q.new_empty(q.shape)
    stats = None
    if need_kv:
        stats = q.new_empty(batch, heads, 3, length, dtype=torch.float32)
    if batch * length == 0:
        blank = q.new_zeros(k.shape, dtype=torch.float32) if need_kv else None
        return dq, blank, blank
    shared = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, mask_ptr=mask, dh_ptr=dh, da_ptr=da, w_down_ptr=w_down,
        stats_ptr=stats, M=length, N=keys, H=heads, R=rank,
        stride_qb=q.stride(0), stride_qm=q.stride(1), stride_kb=k.stride(0),
        stride_kn=k.stride(1), stride_vb=v.stride(0), stride_vn=v.stride(1),
        **mask_strides(mask), D=channels // heads, SCALE=attention_scale,
        PER_QUERY=mask is not None and mask.stride(2) != 0,
    )  # fmt: skip

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        return (triton.cdiv(length, meta["BLOCK_M"]) * batch,), dict(shared, dq_ptr=dq)

    key = (rows_bucket(length), batch, heads)
    launch_query_grad(head, blocks(keys))(plan, q, block_r, *key)
    if not need_kv:
        return dq, None, None
    partial: dict[str, Tensor] = {}

    def plan_keys(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        programs = triton.cdiv(keys, meta["BLOCK_N"]) * heads * batch
        # two programs a processor, each with at least four steps of its loop
        wanted = max(1, 2 * chip(q.device).processors // programs)
        rows = triton.cdiv(triton.cdiv(length, wanted), meta["BLOCK_M"]) * meta["BLOCK_M"]
        rows = max(rows, 4 * meta["BLOCK_M"])
        splits = triton.cdiv(length, rows)
        for name in ("dk_ptr", "dv_ptr"):
            partial[name] = q.new_empty(splits, *k.shape, dtype=torch.float32)
        grid = (triton.cdiv(keys, meta["BLOCK_N"]), heads, batch * splits)
        return grid, dict(shared, **partial, rows_per_split=rows, splits=splits)

    launch_key_grad(head)(plan_keys, q, block_r, *key, keys)
    return dq, partial["dk_ptr"].sum(0), partial["dv_ptr"].sum(0)
