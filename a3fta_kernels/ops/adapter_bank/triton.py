# mypy: allow-untyped-defs
"""`adapter_bank` in Triton: one kernel over the rows of all samples."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    AotKernel,
    Config,
    Launcher,
    activate,
    config,
    dot,
    rank_block,
    rows_bucket,
    shared_limit,
)
from ..activations import activation_code
from ..skinny_triton import RANK_LIMIT


@triton.jit
def adapted_rows(
    h_ptrs, residual_ptrs, y_ptrs, w_down_ptr, w_up_ptr, b_down_ptr, b_up_ptr, scale,
    mask_m, N, R,
    ACT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores residual + scale * adapter(h) for BLOCK_M rows; the pointers to h, residual and y are
    those of the first BLOCK_C columns."""
    offs_r = tl.arange(0, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_r = offs_r < R
    down_ptrs = w_down_ptr + offs_r[None, :] * N + offs_c[:, None]
    a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    held = ()
    if CHUNKS > 0:
        # all loads first: they wait for memory together
        for i in tl.static_range(CHUNKS):
            mask_h = mask_m[:, None] & (offs_c < N - i * BLOCK_C)[None, :]
            h = tl.load(h_ptrs + i * BLOCK_C, mask=mask_h, other=0.0)
            held += (h,)  # type: ignore[assignment]
        for i in tl.static_range(CHUNKS):
            mask_w = (offs_c < N - i * BLOCK_C)[:, None] & mask_r[None, :]
            w_down = tl.load(down_ptrs + i * BLOCK_C, mask=mask_w, other=0.0)
            a = dot(held[i], w_down, a)
    else:
        for c in range(0, N, BLOCK_C):
            mask_c = offs_c < N - c
            h = tl.load(h_ptrs + c, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            w_down = tl.load(down_ptrs + c, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
            a = dot(h, w_down, a)
    if b_down_ptr is not None:
        a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    # an infinite h times the zeros beyond the rank is NaN there
    z = tl.where(mask_r[None, :], activate(a, ACT) * scale, 0.0).to(y_ptrs.dtype.element_ty)
    up_ptrs = w_up_ptr + offs_c[None, :] * R + offs_r[:, None]
    if CHUNKS > 0:
        for i in tl.static_range(CHUNKS):
            store_columns(
                held[i], i * BLOCK_C, z, up_ptrs, b_up_ptr, scale, y_ptrs, mask_m, mask_r, offs_c,
                N, R,
            )  # fmt: skip
    else:
        for c in range(0, N, BLOCK_C):
            mask_y = mask_m[:, None] & (offs_c < N - c)[None, :]
            residual = tl.load(residual_ptrs + c, mask=mask_y, other=0.0)
            store_columns(
                residual, c, z, up_ptrs, b_up_ptr, scale, y_ptrs, mask_m, mask_r, offs_c, N, R
            )


@triton.jit
def store_columns(
    residual, c, z, up_ptrs, b_up_ptr, scale, y_ptrs, mask_m, mask_r, offs_c, N, R
):  # fmt: skip
    """Stores residual + z @ w_up.T + scale * b_up at the columns from c on."""
    mask_c = offs_c < N - c
    mask_w = mask_r[:, None] & mask_c[None, :]
    w_up = tl.load(up_ptrs + tl.cast(c, tl.int64) * R, mask=mask_w, other=0.0)
    y = dot(z, w_up, residual.to(tl.float32))
    if b_up_ptr is not None:
        y += tl.load(b_up_ptr + c + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :] * scale
    tl.store(y_ptrs + c, y.to(y_ptrs.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit(do_not_specialize=["rows_per_sample", "tiles_per_sample", "adapters"])
def bank_kernel(
    h_ptr, residual_ptr, w_down_ptr, w_up_ptr, b_down_ptr, b_up_ptr, scale_ptr, index_ptr, y_ptr,
    rows_per_sample, tiles_per_sample, adapters, N, R, stride_hm, stride_residual_m, stride_ym,
    ACT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h, residual and y (M, N), w_down (adapters, R, N), w_up (adapters, N, R), index (B,).

    One program per BLOCK_M rows of one sample. With CHUNKS, the number of BLOCK_C columns in N, the
    residual is h itself and the rows stay on chip between the two products: h is read once.
    """
    pid = tl.program_id(0)
    sample = pid // tiles_per_sample
    offs_l = (pid % tiles_per_sample) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.arange(0, BLOCK_C)
    mask_m = offs_l < rows_per_sample
    rows = (sample * rows_per_sample + offs_l).to(tl.int64)[:, None]
    residual_ptrs = residual_ptr + rows * stride_residual_m + offs_c[None, :]
    y_ptrs = y_ptr + rows * stride_ym + offs_c[None, :]

    k = tl.load(index_ptr + sample)
    if k == -1:
        for c in range(0, N, BLOCK_C):
            mask = mask_m[:, None] & (offs_c < N - c)[None, :]
            tl.store(y_ptrs + c, tl.load(residual_ptrs + c, mask=mask, other=0.0), mask=mask)
    else:
        inside = (k >= 0) & (k < adapters)
        scale = tl.load(scale_ptr + k, mask=inside, other=float("nan"))
        k = tl.where(inside, k, 0).to(tl.int64)
        adapted_rows(
            h_ptr + rows * stride_hm + offs_c[None, :], residual_ptrs, y_ptrs,
            w_down_ptr + k * R * N, w_up_ptr + k * R * N,
            None if b_down_ptr is None else b_down_ptr + k * R,
            None if b_up_ptr is None else b_up_ptr + k * N,
            scale, mask_m, N, R, ACT, CHUNKS, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip


_TILES = ((64, 64, 4, 3), (32, 64, 4, 4))
_TILES_FP32 = ((32, 32, 8, 2), (16, 32, 4, 2))
# chunks of 64 columns that stay on chip: the U-Nets' widths of 320, 640 and 1280
_HELD = (5, 10, 20)


def bank_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    """Those that read h twice, then those that hold rows of the listed widths."""
    found = []
    for block_m, block_c, num_warps, num_stages in _TILES_FP32 if itemsize == 4 else _TILES:
        shared = num_stages * itemsize * block_c * (block_m + block_r)
        if shared <= shared_limit(capability):
            blocks = dict(BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_R=block_r, CHUNKS=0)
            found.append(config(num_warps, num_stages, **blocks))
    if itemsize == 2 and block_r <= 64:
        for chunks in _HELD:
            # the products of 64 rows read them out of shared memory on these chips alone
            tall = chunks <= 10 and capability in (90, 100, 103)
            block_m = 64 if tall else 32
            found.append(config(8, 1, BLOCK_M=block_m, BLOCK_C=64, BLOCK_R=block_r, CHUNKS=chunks))
    return found


launch_bank = Launcher(bank_kernel, bank_configs)

AOT_KERNELS = (
    AotKernel(
        launch_bank,
        pointers={"scale_ptr": "fp32", "index_ptr": "i32"},
        variants={"all": {"ACT": 2}},
    ),
)


def forward(
    h: Tensor,
    residual: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    b_down: Tensor | None,
    b_up: Tensor | None,
    scale: Tensor,
    index: Tensor,
    activation: str,
) -> Tensor:
    """y (M, C) by the protocol of contract.py."""
    m, n = h.shape
    adapters, rank, _ = w_down.shape
    y = torch.empty_like(h, memory_format=torch.contiguous_format)
    if m == 0:
        return y
    block_r = rank_block(rank, RANK_LIMIT)
    length = m // len(index)
    own = residual is h

    def plan(meta: dict[str, int]) -> tuple[tuple[int, ...], dict[str, Any]]:
        tiles = triton.cdiv(length, meta["BLOCK_M"])
        return (len(index) * tiles,), dict(
            h_ptr=h, residual_ptr=residual, w_down_ptr=w_down, w_up_ptr=w_up, b_down_ptr=b_down,
            b_up_ptr=b_up, scale_ptr=scale, index_ptr=index, y_ptr=y, rows_per_sample=length,
            tiles_per_sample=tiles, adapters=adapters, N=n, R=rank, stride_hm=h.stride(0),
            stride_residual_m=residual.stride(0), stride_ym=n, ACT=activation_code(activation),
        )  # fmt: skip

    def suits(meta: dict[str, int]) -> bool:
        return meta["CHUNKS"] in (0, triton.cdiv(n, meta["BLOCK_C"]) if own else 0)

    launch_bank(plan, h, block_r, rows_bucket(m), rows_bucket(length), n, own, suits=suits)
    return y
