# mypy: allow-untyped-defs
"""The backward of short-key attention, from dy @ weight and da to dq, dk and dv.

    dh = dy @ weight + da @ w_down, formed in registers
    ds = p * (dp - delta),  dp = dh @ v.T,  delta = sum over keys of p * dp
    dq = ds @ k,  dk = ds.T @ q,  dv = p.T @ dh

All keys of a row are at hand, so delta needs neither h nor a pass of its own. dq has a program for
a block of rows and a head; dk and dv, only where asked for, one for a block of keys, a head and a
span of rows. That takes the softmax's statistics from the kernel for dq, and spans are added in a
fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Call,
    Config,
    Launcher,
    cdiv,
    config,
    rank_block,
    rows_bucket,
)
from ..sum_triton import split_rows, totals
from .limits import RANK_LIMIT
from .tiles_triton import (
    HEAD_BLOCK,
    KEY_BLOCK,
    SHAPES,
    append,
    dot_nn,
    dot_nt,
    head_constants,
    head_meta,
    key_meta,
    load_keys,
    load_rows,
    mask_arguments,
    masked_scores,
    softmax,
    store_rows,
    tall_blocks,
    tall_warps,
    text_arguments,
    tiles_to,
    variants,
    zero_tiles,
)


@triton.jit(do_not_specialize=["M"])
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dh_ptr, da_ptr, w_down_ptr, dq_ptr, stats_ptr,
    M, N, H, R, stride_qb, stride_qm, stride_kb, stride_kn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_N: tl.constexpr, COUNT_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, COUNT_D: tl.constexpr, TAIL_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q (B, M, C), k and v (B, N, C); dh (B * M, C) without its part from da (B * M, R);
    dq (B * M, C). stats (B, H, 3, M): top and norm of `softmax`, and delta.

    One program per BLOCK_M rows of one sample and head.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    head = tl.program_id(1)
    c = head * D
    C = H * D
    # the tile's place is part of its pointers: offsets inside it need no 64 bits
    q_ptr += sample * stride_qb + first * stride_qm
    k_ptr += sample * stride_kb
    v_ptr += sample * stride_kb
    dh_ptr += (sample * M + first) * C
    da_ptr += (sample * M + first) * R
    dq_ptr += (sample * M + first) * C
    if mask_ptr is not None:
        mask_ptr += sample * stride_mask_b + head * stride_mask_h + first * stride_mask_m
    if stats_ptr is not None:
        stats_ptr += (sample * H + head) * 3 * M + first
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - first
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype: tl.constexpr = dq_ptr.dtype.element_ty

    da_ptrs = da_ptr + offs_m[:, None] * R + offs_r[None, :]
    da = tl.load(da_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
    # dh and its products come first: their tiles are gone when the scores' come
    dh = load_rows(dh_ptr + c, offs_m, mask_m, C, D, BLOCK_D, COUNT_D, TAIL_D)
    down = load_rows(w_down_ptr + c, offs_r, mask_r, C, D, BLOCK_D, COUNT_D, TAIL_D)
    dh = tiles_to(dot_nn(da, down, tiles_to(dh, tl.float32)), dtype)
    dp = ()
    for i in tl.static_range(COUNT_N + (TAIL_N > 0)):
        v = load_keys(
            v_ptr + c, N, stride_kn, i, BLOCK_N, COUNT_N, TAIL_N, D, BLOCK_D, COUNT_D, TAIL_D
        )
        dp = append(dp, dot_nt(dh, v, tl.zeros((BLOCK_M, v[0].shape[0]), dtype=tl.float32)))

    q = load_rows(q_ptr + c, offs_m, mask_m, stride_qm, D, BLOCK_D, COUNT_D, TAIL_D)
    s = ()
    for i in tl.static_range(COUNT_N + (TAIL_N > 0)):
        k = load_keys(
            k_ptr + c, N, stride_kn, i, BLOCK_N, COUNT_N, TAIL_N, D, BLOCK_D, COUNT_D, TAIL_D
        )
        offs_n = i * BLOCK_N + tl.arange(0, k[0].shape[0])
        one = masked_scores(
            q, k, mask_ptr, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n, SCALE,
            PER_QUERY,
        )  # fmt: skip
        s = append(s, one)
    p, top, norm = softmax(s)
    p = tiles_to(p, tl.float32, norm[:, None])
    delta = tl.zeros_like(top)
    for i in tl.static_range(len(p)):
        delta += tl.sum(p[i] * dp[i], axis=1)
    dq = zero_tiles(BLOCK_M, BLOCK_D, COUNT_D, TAIL_D)
    for i in tl.static_range(len(p)):
        ds = (p[i] * (dp[i] - delta[:, None])).to(dtype)
        if len(p) > 1:  # else the only block is still at hand
            k = load_keys(
                k_ptr + c, N, stride_kn, i, BLOCK_N, COUNT_N, TAIL_N, D, BLOCK_D, COUNT_D, TAIL_D
            )
        dq = dot_nn(ds, k, dq)
    dq = tiles_to(dq, dtype, SCALE)
    store_rows(dq_ptr + c, dq, offs_m, mask_m, C, D, BLOCK_D)
    if stats_ptr is not None:
        stats = stats_ptr + offs_m
        tl.store(stats, top, mask=mask_m)
        tl.store(stats + M, norm, mask=mask_m)
        tl.store(stats + 2 * M, delta, mask=mask_m)


@triton.jit(do_not_specialize=["M", "rows_per_split", "splits"])
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, dh_ptr, da_ptr, w_down_ptr, stats_ptr, dk_ptr, dv_ptr,
    M, N, H, R, rows_per_split, splits,
    stride_qb, stride_qm, stride_kb, stride_kn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr,
    BLOCK_D: tl.constexpr, COUNT_D: tl.constexpr, TAIL_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
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
    mask_r = offs_r < R
    c = head * D
    C = H * D
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    q_ptr += sample * stride_qb + c
    k_ptr += sample * stride_kb + c
    v_ptr += sample * stride_kb + c
    dh_ptr += sample * M * C + c
    da_ptr += sample * M * R
    stats_ptr += (sample * H + head) * 3 * M
    if mask_ptr is not None:
        mask_ptr += sample * stride_mask_b + head * stride_mask_h

    k = load_rows(k_ptr, offs_n, mask_n, stride_kn, D, BLOCK_D, COUNT_D, TAIL_D)
    v = load_rows(v_ptr, offs_n, mask_n, stride_kn, D, BLOCK_D, COUNT_D, TAIL_D)
    down = load_rows(w_down_ptr + c, offs_r, mask_r, C, D, BLOCK_D, COUNT_D, TAIL_D)
    dk = zero_tiles(BLOCK_N, BLOCK_D, COUNT_D, TAIL_D)
    dv = zero_tiles(BLOCK_N, BLOCK_D, COUNT_D, TAIL_D)
    offs_m = tl.arange(0, BLOCK_M)
    last = tl.minimum((split + 1) * rows_per_split, M)
    for first in range(split * rows_per_split, last, BLOCK_M):
        mask_m = offs_m < last - first
        q = load_rows(
            q_ptr + first * stride_qm, offs_m, mask_m, stride_qm, D, BLOCK_D, COUNT_D, TAIL_D
        )
        dh = load_rows(dh_ptr + first * C, offs_m, mask_m, C, D, BLOCK_D, COUNT_D, TAIL_D)
        da_ptrs = da_ptr + first * R + offs_m[:, None] * R + offs_r[None, :]
        da = tl.load(da_ptrs, mask=mask_m[:, None] & mask_r[None, :], other=0.0)
        dh = tiles_to(dot_nn(da, down, tiles_to(dh, tl.float32)), dtype)
        stats = stats_ptr + first + offs_m
        # a row that is not there has p = 0, whatever a mask adds to its scores
        top = tl.load(stats, mask=mask_m, other=float("inf"))
        norm = tl.load(stats + M, mask=mask_m, other=0.0)
        delta = tl.load(stats + 2 * M, mask=mask_m, other=0.0)
        mask_rows = mask_ptr
        if mask_ptr is not None:
            mask_rows += first * stride_mask_m

        s = masked_scores(
            q, k, mask_rows, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n, SCALE,
            PER_QUERY,
        )  # fmt: skip
        p = tl.exp(s - top[:, None]) * norm[:, None]
        dp = dot_nt(dh, v, tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32))
        ds = p * (dp - delta[:, None])
        dv = dot_nn(tl.trans(p.to(dtype)), dh, dv)
        dk = dot_nn(tl.trans(ds.to(dtype)), q, dk)

    out = (split * batch + sample) * N * C + c
    dk = tiles_to(dk, tl.float32, SCALE)
    store_rows(dk_ptr + out, dk, offs_n, mask_n, C, D, BLOCK_D)
    store_rows(dv_ptr + out, dv, offs_n, mask_n, C, D, BLOCK_D)


def query_grad_configs(
    head_dim: int, long: bool, by_query: bool, itemsize: int, block_r: int, capability: int
) -> list[Config]:
    """long: more keys than one block has."""
    if long:
        sizes = [(16, 8, 1)]
    elif head_dim <= HEAD_BLOCK:
        sizes = [(64, 4, 2), (32, 4, 2), (16, 4, 2)]
    elif head_dim > 128:
        sizes = [(16, 4, 1), (16, 8, 1)]
    elif capability in (90, 100, 103):
        sizes = [(64, tall_warps(capability), 2), (16, 4, 2)]
    elif head_dim > 96:  # without wgmma a product's operands stand in registers too
        sizes = [(32, 4, 2), (16, 4, 2)]
    else:  # and a tail of a head beside a block
        sizes = [(16, 4, 2)]
    # a mask by query is one more tile
    tall = not by_query and tall_blocks(head_dim, capability)
    return [config(w, s, BLOCK_M=m, BLOCK_R=block_r) for m, w, s in sizes if m < 64 or tall]


def key_grad_configs(head_dim: int, itemsize: int, block_r: int, capability: int) -> list[Config]:
    if head_dim <= HEAD_BLOCK:
        sizes = [(64, 64, tall_warps(capability), 1), (32, 32, 4, 1)]
    elif head_dim <= 96 and capability in (100, 103):
        sizes = [(64, 64, 8, 1)]
    elif 96 < head_dim <= 128:
        sizes = [(32, 32, 8, 1)]
    else:
        sizes = [(16, 16, 4, 1)]
    tall = tall_blocks(head_dim, capability)
    return [
        config(w, s, BLOCK_M=m, BLOCK_N=n, BLOCK_R=block_r)
        for m, n, w, s in sizes
        if m < 64 or tall
    ]


@functools.cache
def launch_query_grad(head_dim: int, long: bool, by_query: bool) -> Launcher:
    configs = functools.partial(query_grad_configs, head_dim, long, by_query)
    return Launcher(query_grad_kernel, configs)


@functools.cache
def launch_key_grad(head_dim: int) -> Launcher:
    return Launcher(key_grad_kernel, functools.partial(key_grad_configs, head_dim))


_HEADS = tuple(dict.fromkeys(d for d, _ in SHAPES))
AOT_KERNELS = (
    AotKernel(
        launch_query_grad(SHAPES[0][0], SHAPES[0][1] > KEY_BLOCK, False),
        pointers={"stats_ptr": "fp32"},
        variants={
            name: dict(head_constants(d, mask), **key_meta(n))
            for name, (d, n, mask) in variants().items()
        },
        fixed_blocks=(64,),
        dtypes=("bf16", "fp16"),
        launchers={
            name: launch_query_grad(d, n > KEY_BLOCK, mask == "query")
            for name, (d, n, mask) in variants().items()
        },
    ),
    AotKernel(
        launch_key_grad(_HEADS[0]),
        pointers={"stats_ptr": "fp32", "dk_ptr": "fp32", "dv_ptr": "fp32"},
        variants={f"D{d}": head_constants(d) for d in _HEADS},
        fixed_blocks=(64,),
        dtypes=("bf16", "fp16"),
        launchers={f"D{d}": launch_key_grad(d) for d in _HEADS},
    ),
)


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
    head_dim = channels // heads
    dq = q.new_empty(q.shape)
    stats = None
    if need_kv:
        stats = q.new_empty(batch, heads, 3, length, dtype=torch.float32)
    if batch * length == 0:
        blank = q.new_zeros(k.shape, dtype=torch.float32) if need_kv else None
        return dq, blank, blank
    attended = mask_arguments(mask)
    shared = dict(
        dh_ptr=dh, da_ptr=da, w_down_ptr=w_down, stats_ptr=stats,
        M=length, H=heads, R=rank, **text_arguments(q, k, v), **attended,
        D=head_dim, SCALE=attention_scale, **head_meta(head_dim),
    )  # fmt: skip

    def plan(meta: dict[str, int]) -> Call:
        grid = (cdiv(length, meta["BLOCK_M"]) * batch, heads)
        return grid, dict(shared, dq_ptr=dq, **key_meta(keys))

    # texts of about the same length share their tiles
    key = (rows_bucket(length), batch, heads, mask is None, *key_meta(keys).values())
    launch_query_grad(head_dim, keys > KEY_BLOCK, attended["PER_QUERY"])(plan, q, block_r, *key)
    if not need_kv:
        return dq, None, None
    partial: dict[str, Tensor] = {}

    def plan_keys(meta: dict[str, int]) -> Call:
        tiles_n = cdiv(keys, meta["BLOCK_N"])
        rows = split_rows(length, meta["BLOCK_M"], tiles_n * heads * batch, q.device)
        splits = cdiv(length, rows)
        for name in ("dk_ptr", "dv_ptr"):
            partial[name] = q.new_empty(splits, *k.shape, dtype=torch.float32)
        grid = (tiles_n, heads, batch * splits)
        return grid, dict(shared, **partial, rows_per_split=rows, splits=splits)

    launch_key_grad(head_dim)(plan_keys, q, block_r, *key)
    dk, dv = totals(partial["dk_ptr"], partial["dv_ptr"], axis=0)
    return dq, dk, dv
