# mypy: allow-untyped-defs
"""`cross_attention_adapter` in Triton: attention whose epilogue makes the adapter's bottleneck.

forward   one kernel: a program owns BLOCK_M rows of one sample and all heads. For each head the
          scores against all keys stand on chip, softmax is taken in one go, h is written and
          a += h @ w_down.T grows in registers; z goes beside h. One library GEMM of (h, z) and
          (weight, V) ends it: z takes no pass of its own over h.
backward  da and the sums over rows in one pass over dy, dy @ weight by the library GEMM, and the
          kernels of backward_triton, which make dq of both, and dk and dv where asked for.
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
    cdiv,
    config,
    dense,
    modulated,
    rank_block,
    rows_bucket,
)
from ..activations import activation_code
from ..grad_triton import weight_grads
from ..rule import AdapterGrads
from ..skinny_triton import rows_backward
from .backward_triton import attention_grads
from .layout import RANK_LIMIT, hz_widths
from .tiles_triton import (
    HEAD_BLOCK,
    KEY_BLOCK,
    SHAPES,
    append,
    cast,
    head_constants,
    head_meta,
    key_meta,
    load_keys,
    load_rows,
    mask_arguments,
    masked_scores,
    outer,
    softmax,
    store_rows,
    tall_blocks,
    tall_warps,
    text_arguments,
    times,
    variants,
    zeros,
)


@triton.jit(do_not_specialize=["M"])
def attention_down_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, w_down_ptr, b_down_ptr, gamma_ptr, beta_ptr, hz_ptr, a_ptr,
    M, N, H, R, Z, stride_qb, stride_qm, stride_kb, stride_kn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_hz,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr, ACT: tl.constexpr,
    BLOCK_N: tl.constexpr, COUNT_N: tl.constexpr, TAIL_N: tl.constexpr,
    BLOCK_D: tl.constexpr, COUNT_D: tl.constexpr, TAIL_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q (B, M, C), k and v (B, N, C), C = H * D; w_down (R, C); a (B * M, R).

    hz (B * M, C + Z) holds h and then z, with zeros past R. One program per BLOCK_M rows of one
    sample.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M
    # the tile's place is part of its pointers: offsets inside it need no 64 bits
    q_ptr += sample * stride_qb + first * stride_qm
    k_ptr += sample * stride_kb
    v_ptr += sample * stride_kb
    hz_ptr += (sample * M + first) * stride_hz
    a_ptr += (sample * M + first) * R
    if mask_ptr is not None:
        mask_ptr += sample * stride_mask_b + first * stride_mask_m
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M - first
    C = H * D
    dtype: tl.constexpr = hz_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for head in range(H):
        c = head * D
        mask_head = mask_ptr
        if mask_ptr is not None:
            mask_head += head * stride_mask_h
        q = load_rows(q_ptr + c, offs_m, mask_m, stride_qm, D, BLOCK_D, COUNT_D, TAIL_D)
        s = ()
        for i in tl.static_range(COUNT_N + (TAIL_N > 0)):
            k = load_keys(
                k_ptr + c, N, stride_kn, i, BLOCK_N, COUNT_N, TAIL_N, D, BLOCK_D, COUNT_D, TAIL_D
            )
            offs_n = i * BLOCK_N + tl.arange(0, k[0].shape[0])
            one = masked_scores(
                q, k, mask_head, offs_m, mask_m, offs_n, N, stride_mask_m, stride_mask_n, SCALE,
                PER_QUERY,
            )  # fmt: skip
            s = append(s, one)
        p, _, norm = softmax(s)
        h = zeros(BLOCK_M, BLOCK_D, COUNT_D, TAIL_D)
        for i in tl.static_range(COUNT_N + (TAIL_N > 0)):
            v = load_keys(
                v_ptr + c, N, stride_kn, i, BLOCK_N, COUNT_N, TAIL_N, D, BLOCK_D, COUNT_D, TAIL_D
            )
            h = times(p[i].to(dtype), v, h)
        h = cast(h, dtype, norm[:, None])
        store_rows(hz_ptr + c, h, offs_m, mask_m, stride_hz, D, BLOCK_D)
        down = load_rows(w_down_ptr + c, offs_r, mask_r, C, D, BLOCK_D, COUNT_D, TAIL_D)
        acc_a = outer(h, down, acc_a)

    if b_down_ptr is not None:
        acc_a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    mask_a = mask_m[:, None] & mask_r[None, :]
    a_ptrs = a_ptr + offs_m[:, None] * R + offs_r[None, :]
    tl.store(a_ptrs, acc_a.to(a_ptr.dtype.element_ty), mask=mask_a)
    rows = sample * M + first + offs_m
    z = modulated(acc_a, gamma_ptr, beta_ptr, rows, mask_m, offs_r, mask_r, M, R, ACT)
    z_ptrs = hz_ptr + offs_m[:, None] * stride_hz + (C + offs_r)[None, :]
    tl.store(z_ptrs, z.to(dtype), mask=mask_m[:, None] & (offs_r < Z)[None, :])


def attention_down_configs(
    head_dim: int, keys: int, by_query: bool, itemsize: int, block_r: int, capability: int
) -> list[Config]:
    if keys > KEY_BLOCK:
        sizes = [(16, 8, 1)]
    elif head_dim <= HEAD_BLOCK:
        sizes = [(64, 4, 2), (32, 4, 2), (16, 4, 2)]
    elif capability in (90, 100, 103):
        sizes = [(64, tall_warps(capability), 2), (32, 8, 1), (16, 8, 1)]
    else:  # without wgmma a product's operands stand in registers too
        sizes = [(32, 8, 1), (16, 8, 1)]
    # a mask by query is one more tile
    tall = not by_query and tall_blocks(head_dim, capability)
    return [config(w, s, BLOCK_M=m, BLOCK_R=block_r) for m, w, s in sizes if m < 64 or tall]


@functools.cache
def launch_attention_down(head_dim: int, keys: int, by_query: bool) -> Launcher:
    configs = functools.partial(attention_down_configs, head_dim, keys, by_query)
    return Launcher(attention_down_kernel, configs)


AOT_KERNELS = (
    AotKernel(
        launch_attention_down(*SHAPES[0], False),
        pointers={},
        variants={
            name: dict(ACT=2, **head_constants(d, mask), **key_meta(n))
            for name, (d, n, mask) in variants().items()
        },
        ranks=(64,),
        dtypes=("bf16", "fp16"),
        launchers={
            name: launch_attention_down(d, n, mask == "query")
            for name, (d, n, mask) in variants().items()
        },
    ),
)


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
    """(y, hz, a) by the protocol of contract.py."""
    batch, length, channels = q.shape
    n, rank = v_up.shape
    columns, width = hz_widths(channels, rank)
    hz, a = q.new_empty(batch * length, width), q.new_empty(batch * length, rank)
    if width > columns:  # of odd sizes: what no kernel writes
        hz[:, columns:] = 0.0
    if batch * length == 0:
        return q.new_empty(0, n), hz, a
    head_dim, keys = channels // heads, k.shape[1]
    block_r = rank_block(rank, RANK_LIMIT)

    attended = mask_arguments(mask)

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        return (cdiv(length, meta["BLOCK_M"]) * batch,), dict(
            w_down_ptr=w_down, b_down_ptr=dense(b_down), gamma_ptr=dense(gamma),
            beta_ptr=dense(beta), hz_ptr=hz, a_ptr=a, M=length, H=heads, R=rank,
            Z=columns - channels, stride_hz=width, D=head_dim, SCALE=attention_scale,
            ACT=activation_code(activation), **text_arguments(q, k, v), **attended,
            **head_meta(head_dim), **key_meta(keys),
        )  # fmt: skip

    launch = launch_attention_down(head_dim, keys, attended["PER_QUERY"])
    launch(plan, q, block_r, rows_bucket(length), batch, heads, mask is None)
    parts = [weight, v_up]
    if columns > channels + rank:  # what z's zeros meet
        parts.append(v_up.new_zeros(n, columns - channels - rank))
    merged = torch.cat(parts, dim=1).t()
    inputs = hz[:, :columns]
    if residual is not None:
        start = residual + bias if bias is not None else residual
        return torch.addmm(start, inputs, merged), hz, a
    y = torch.mm(inputs, merged) if bias is None else torch.addmm(bias, inputs, merged)
    return y, hz, a


def backward(
    dy: Tensor,
    hz: Tensor,
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
    up = rows_backward(dy, a, v_up.contiguous(), gamma, beta, activation, need_sums=need_dw)
    dq = dk = dv = None
    if need_q or need_kv:
        dq, dk, dv = attention_grads(
            dy @ weight, up.da, w_down, q, k, v, mask, heads, attention_scale, need_kv
        )
    if not need_dw:
        return dq, dk, dv, AdapterGrads(None, None, None, None, None, None, None)
    h = hz[:, : w_down.shape[1]]
    return dq, dk, dv, weight_grads(None, h, dy, up)
