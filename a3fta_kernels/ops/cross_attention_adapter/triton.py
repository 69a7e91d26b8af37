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
    config,
    dense,
    modulated,
    rank_block,
    rows_bucket,
)
from ..activations import activation_code
from ..grad_triton import weight_grad
from ..rule import AdapterGrads
from ..skinny_triton import rows_backward
from .backward_triton import attention_grads
from .layout import RANK_LIMIT, hz_widths
from .tiles_triton import (
    Blocks,
    blocks,
    cast,
    load_keys,
    load_rows,
    mask_strides,
    outer,
    probabilities,
    store_rows,
    times,
    zeros,
)


@triton.jit(do_not_specialize=["M"])
def attention_down_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, w_down_ptr, b_down_ptr, gamma_ptr, beta_ptr, hz_ptr, a_ptr,
    M, N, H, R, Z, stride_qb, stride_qm, stride_kb, stride_kn, stride_vb, stride_vn,
    stride_mask_b, stride_mask_h, stride_mask_m, stride_mask_n, stride_hz,
    D: tl.constexpr, SCALE: tl.constexpr, PER_QUERY: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N_1: tl.constexpr, BLOCK_N_2: tl.constexpr,
    BLOCK_D_1: tl.constexpr, BLOCK_D_2: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """q (B, M, C), k and v (B, N, C), C = H * D; w_down (R, C); a (B * M, R).

    hz (B * M, C + Z) holds h and then z, with zeros past R. One program per BLOCK_M rows of one
    sample.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    offs_m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    offs_m = offs_m.to(tl.int64)
    rows = sample * M + offs_m
    C = H * D
    dtype: tl.constexpr = hz_ptr.dtype.element_ty
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R

    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
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
        p, _, norm = probabilities(
            q, k, mask_head, offs_m, mask_m, N, stride_mask_m, stride_mask_n, SCALE, PER_QUERY
        )
        h = times(p[0].to(dtype), v[0], zeros(BLOCK_M, BLOCK_D_1, BLOCK_D_2))
        if BLOCK_N_2 > 0:
            h = times(p[1].to(dtype), v[1], h)
        h = cast(h, dtype, norm[:, None])
        store_rows(hz_ptr + c, h, rows, mask_m, stride_hz, D, BLOCK_D_1, BLOCK_D_2)
        down = load_rows(w_down_ptr + c, offs_r, mask_r, C, D, BLOCK_D_1, BLOCK_D_2)
        acc_a = outer(h, down, acc_a)

    if b_down_ptr is not None:
        acc_a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    a_ptrs = a_ptr + rows[:, None] * R + offs_r[None, :]
    tl.store(a_ptrs, acc_a.to(a_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])
    z = modulated(acc_a, gamma_ptr, beta_ptr, rows, mask_m, offs_r, mask_r, M, R, ACT)
    z_ptrs = hz_ptr + rows[:, None] * stride_hz + (C + offs_r)[None, :]
    mask_z = mask_m[:, None] & (offs_r < Z)[None, :]
    tl.store(z_ptrs, z.to(hz_ptr.dtype.element_ty), mask=mask_z)


def attention_down_configs(
    head: Blocks, keys: Blocks, itemsize: int, block_r: int, capability: int
) -> list[Config]:
    fixed = dict(
        BLOCK_N_1=keys.first, BLOCK_N_2=keys.second, BLOCK_D_1=head.first, BLOCK_D_2=head.second,
        BLOCK_R=block_r,
    )  # fmt: skip
    found = []
    for block_m, num_warps, num_stages in _FP32 if itemsize == 4 else _HALF:
        found.append(config(num_warps, num_stages, BLOCK_M=block_m, **fixed))
    return found


_HALF = ((64, 4, 2), (128, 8, 2), (32, 4, 2), (16, 4, 1))
_FP32 = ((32, 4, 1), (16, 4, 1))


@functools.cache
def launch_attention_down(head: Blocks, keys: Blocks) -> Launcher:
    """The launcher for heads and keys of these blocks."""
    return Launcher(
        attention_down_kernel, functools.partial(attention_down_configs, head, keys)
    )


AOT_KERNELS = ()


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
    if batch * length == 0:
        return q.new_empty(0, n), hz, a
    head, keys = blocks(channels // heads), blocks(k.shape[1])
    block_r = rank_block(rank, RANK_LIMIT)

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        grid = (triton.cdiv(length, meta["BLOCK_M"]) * batch,)
        return grid, dict(
            q_ptr=q, k_ptr=k, v_ptr=v, mask_ptr=mask, w_down_ptr=w_down,
            b_down_ptr=dense(b_down), gamma_ptr=dense(gamma), beta_ptr=dense(beta), hz_ptr=hz,
            a_ptr=a, M=length, N=k.shape[1], H=heads, R=rank, Z=columns - channels,
            stride_qb=q.stride(0), stride_qm=q.stride(1), stride_kb=k.stride(0),
            stride_kn=k.stride(1), stride_vb=v.stride(0), stride_vn=v.stride(1),
            **mask_strides(mask), stride_hz=width, D=channels // heads, SCALE=attention_scale,
            PER_QUERY=mask is not None and mask.stride(2) != 0, ACT=activation_code(activation),
        )  # fmt: skip

    launch_attention_down(head, keys)(plan, q, block_r, rows_bucket(length), batch, heads)
    # beside V the columns that meet z's zeros
    blank = v_up.new_zeros(n, columns - channels - rank)
    merged = torch.cat((weight, v_up, blank), dim=1).t()
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
    dw_down, _ = weight_grad(h, up.da, transposed=True)
    g_up, dy_sum = weight_grad(dy, a, from_a=True, gamma=gamma, beta=beta, activation=activation)
    grads = AdapterGrads(None, dw_down, g_up, up.da_sum, dy_sum, up.dgamma, up.dbeta)
    return dq, dk, dv, grads
