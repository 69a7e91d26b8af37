# mypy: allow-untyped-defs
"""V, and the gradients of what it is made of, in a launch each.

    merged    V = s * Ws @ w_up, v_bias = bias + s * Ws @ b_up, and w_down in Ws's dtype
    up_grads  dw_up = s * Ws.T @ P, db_up = s * Ws.T @ sum(dy)

PyTorch takes five kernels for the one and six for the other, most of them casts between the fp32 of
an adapter that trains and the 16 bits of the frozen weight. Beside a weight in fp32, where nothing
is cast, and for a scale in a tensor both are up.py's.
"""

from __future__ import annotations

from typing import Any

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
    dot,
    narrowed,
    rank_block,
    shared_limit,
)
from ..rule import contiguous
from . import up

DTYPES = (torch.float16, torch.bfloat16)  # in fp32 there is nothing to cast
CAST_BLOCK: tl.constexpr = tl.constexpr(2048)


@triton.jit
def merged_kernel(
    weight_ptr, bias_ptr, w_down_ptr, w_up_ptr, b_up_ptr, v_ptr, v_bias_ptr, narrow_ptr,
    N, C, R, scale, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, C), bias and v_bias (N,), w_down and narrow (R, C), w_up (C, R), b_up (C,),
    v (N, R).

    One program per (BLOCK_M outputs, BLOCK_R ranks); those after them copy w_down.
    """
    pid = tl.program_id(0)
    tiles_r = tl.cdiv(R, BLOCK_R)
    products = tl.cdiv(N, BLOCK_M) * tiles_r
    if pid < products:
        offs_n = (pid // tiles_r) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_r = (pid % tiles_r) * BLOCK_R + tl.arange(0, BLOCK_R)
        offs_k = tl.arange(0, BLOCK_K)
        mask_n = offs_n < N
        mask_r = offs_r < R
        w_ptrs = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
        shift = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        for c in range(0, C, BLOCK_K):
            mask_k = offs_k < C - c
            w = tl.load(w_ptrs + c, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
            up_ptrs = w_up_ptr + (c + offs_k)[:, None] * R + offs_r[None, :]
            w_up = tl.load(up_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
            acc = dot(w, narrowed(w_up, w.dtype), acc)
            if b_up_ptr is not None:
                b_up = tl.load(b_up_ptr + c + offs_k, mask=mask_k, other=0.0).to(tl.float32)
                shift += w.to(tl.float32) * b_up[None, :]
        v_ptrs = v_ptr + offs_n[:, None] * R + offs_r[None, :]
        v = (acc * scale).to(v_ptr.dtype.element_ty)
        tl.store(v_ptrs, v, mask=mask_n[:, None] & mask_r[None, :])
        if b_up_ptr is not None and pid % tiles_r == 0:
            v_bias = tl.sum(shift, axis=1) * scale
            if bias_ptr is not None:
                v_bias += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            tl.store(v_bias_ptr + offs_n, v_bias, mask=mask_n)
    elif narrow_ptr is not None:
        offs = (pid - products) * CAST_BLOCK + tl.arange(0, CAST_BLOCK)
        mask = offs < R * C
        x = tl.load(w_down_ptr + offs, mask=mask, other=0.0)
        tl.store(narrow_ptr + offs, narrowed(x, narrow_ptr.dtype.element_ty), mask=mask)


@triton.jit
def up_grads_kernel(
    weight_ptr, p_ptr, dy_sum_ptr, dw_up_ptr, db_up_ptr,
    N, C, R, scale, stride_wn,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weight (N, C), p (N, R) and dy_sum (N,) in fp32; dw_up (C, R), db_up (C,).

    One program per (BLOCK_M channels, BLOCK_R ranks).
    """
    offs_c = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_c = offs_c < C
    mask_r = offs_r < R
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    shift = tl.zeros((BLOCK_K, BLOCK_M), dtype=tl.float32)
    for n in range(0, N, BLOCK_K):
        offs_n = n + offs_k
        mask_k = offs_n < N
        w_ptrs = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_c[None, :]
        w = tl.load(w_ptrs, mask=mask_k[:, None] & mask_c[None, :], other=0.0)
        p_ptrs = p_ptr + offs_n[:, None] * R + offs_r[None, :]
        p = tl.load(p_ptrs, mask=mask_k[:, None] & mask_r[None, :], other=0.0)
        if weight_ptr.dtype.element_ty == tl.float16:
            # a sum over rows may leave fp16's range, not tf32's, which has as many digits
            acc = tl.dot(tl.trans(w.to(tl.float32)), p, acc, input_precision="tf32")
        else:
            acc = dot(tl.trans(w), narrowed(p, w.dtype), acc)
        if db_up_ptr is not None:
            dy_sum = tl.load(dy_sum_ptr + offs_n, mask=mask_k, other=0.0)
            shift += w.to(tl.float32) * dy_sum[:, None]
    dw_ptrs = dw_up_ptr + offs_c[:, None] * R + offs_r[None, :]
    dw_up = (acc * scale).to(dw_up_ptr.dtype.element_ty)
    tl.store(dw_ptrs, dw_up, mask=mask_c[:, None] & mask_r[None, :])
    if db_up_ptr is not None and tl.program_id(1) == 0:
        db_up = (tl.sum(shift, axis=0) * scale).to(db_up_ptr.dtype.element_ty)
        tl.store(db_up_ptr + offs_c, db_up, mask=mask_c)


# BLOCK_M, BLOCK_K, num_warps, num_stages; few outputs a program, as there are few: a weight of
# 1280 gives 20 programs of 64
_TILES = ((64, 64, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (16, 128, 4, 2), (16, 64, 4, 3))


def up_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    found = []
    for block_m, block_k, num_warps, num_stages in _TILES:
        # of w_up and P both the fp32 that is loaded and what the product takes
        shared = num_stages * block_k * (itemsize * block_m + 4 * block_r)
        shared += 4 * block_k * (block_m + block_r)
        if shared <= shared_limit(capability):
            found.append(
                config(num_warps, num_stages, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=block_r)
            )
    return found


launch_merged = Launcher(merged_kernel, up_configs)
launch_up_grads = Launcher(up_grads_kernel, up_configs)

_NOTHING_TO_CAST: dict[str, Any] = {"w_down_ptr": None, "narrow_ptr": None}

AOT_KERNELS = (
    AotKernel(
        launch_merged,
        pointers={
            "w_down_ptr": "fp32", "w_up_ptr": "fp32", "b_up_ptr": "fp32", "v_bias_ptr": "fp32",
            "scale": "fp32",
        },
        variants={
            "cast": {},
            "no bias": {"b_up_ptr": None, "bias_ptr": None, "v_bias_ptr": None} | _NOTHING_TO_CAST,
        },
        dtypes=("bf16", "fp16"),
    ),
    AotKernel(
        launch_up_grads,
        pointers={
            "p_ptr": "fp32", "dy_sum_ptr": "fp32", "dw_up_ptr": "fp32", "db_up_ptr": "fp32",
            "scale": "fp32",
        },
        dtypes=("bf16", "fp16"),
    ),
)  # fmt: skip


def merged(
    weight: Tensor,
    bias: Tensor | None,
    w_down: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    scale_tensor: Tensor | None,
    scale: float,
    start: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """By the protocol of contract.py; of a bias alone that bias, as the kernels read any dtype."""
    if weight.dtype not in DTYPES or scale_tensor is not None:
        return up.merged(weight, bias, w_down, w_up, b_up, scale_tensor, scale, start)
    n, (c, rank) = weight.shape[0], w_up.shape
    part = weight[:, start : start + c]
    v = weight.new_empty(n, rank)
    v_bias = bias if b_up is None else weight.new_empty(n, dtype=torch.float32)
    w_down = w_down.contiguous()
    narrow = None if w_down.dtype == weight.dtype else w_down.new_empty(rank, c, dtype=weight.dtype)
    arguments = dict(
        weight_ptr=part, bias_ptr=contiguous(bias), w_down_ptr=None if narrow is None else w_down,
        w_up_ptr=w_up.contiguous(), b_up_ptr=contiguous(b_up), v_ptr=v,
        v_bias_ptr=None if b_up is None else v_bias, narrow_ptr=narrow, N=n, C=c, R=rank,
        scale=scale, stride_wn=part.stride(0),
    )  # fmt: skip
    block_r = rank_block(rank)
    copies = 0 if narrow is None else cdiv(narrow.numel(), CAST_BLOCK.value)

    def plan(meta: dict[str, int]) -> Call:
        products = cdiv(n, meta["BLOCK_M"]) * cdiv(rank, block_r)
        return (products + copies,), arguments

    launch_merged(plan, weight, block_r, n, c, b_up is None, copies)
    return w_down if narrow is None else narrow, v, v_bias


def up_grads(
    weight_slice: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    p: Tensor,
    dy_sum: Tensor,
    scale_tensor: Tensor | None,
    scale: float,
    need_scale: bool,
) -> dict[str, Tensor | None]:
    """By the protocol of contract.py, in the dtypes of w_up and b_up."""
    if weight_slice.dtype not in DTYPES or scale_tensor is not None:
        return up.up_grads(
            weight_slice, w_up, b_up, p, dy_sum, scale_tensor, scale, need_scale
        )  # fmt: skip
    n, c = weight_slice.shape
    rank = w_up.shape[1]
    dw_up = w_up.new_empty(c, rank)
    db_up = None if b_up is None else b_up.new_empty(c)
    arguments = dict(
        weight_ptr=weight_slice, p_ptr=p, dy_sum_ptr=dy_sum, dw_up_ptr=dw_up, db_up_ptr=db_up,
        N=n, C=c, R=rank, scale=scale, stride_wn=weight_slice.stride(0),
    )  # fmt: skip
    block_r = rank_block(rank)

    def plan(meta: dict[str, int]) -> Call:
        return (cdiv(c, meta["BLOCK_M"]), cdiv(rank, block_r)), arguments

    launch_up_grads(plan, weight_slice, block_r, n, c, b_up is None)
    return {"w_up": dw_up, "b_up": db_up}
