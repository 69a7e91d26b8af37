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
def store_columns(
    y, c, z, w_up_ptr, b_up_ptr, scale, y_ptr, rows, mask_m, offs_c, offs_r, mask_r, N, R, stride_ym
):  # fmt: skip
    """Stores y + z @ w_up.T + scale * b_up at the columns from c on."""
    offs_n = c + offs_c
    mask_n = offs_n < N
    w_ptrs = w_up_ptr + offs_n.to(tl.int64)[None, :] * R + offs_r[:, None]
    w_up = tl.load(w_ptrs, mask=mask_r[:, None] & mask_n[None, :], other=0.0)
    y = dot(z, w_up, y.to(tl.float32))
    if b_up_ptr is not None:
        y += tl.load(b_up_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :] * scale
    y_ptrs = y_ptr + rows * stride_ym + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def adapted_rows(
    h_ptr, residual_ptr, y_ptr, w_down_ptr, w_up_ptr, b_down_ptr, b_up_ptr, scale,
    rows, mask_m, N, R, stride_hm, stride_residual_m, stride_ym,
    ACT: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores residual + scale * adapter(h) for BLOCK_M rows."""
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    h_ptrs = h_ptr + rows * stride_hm + offs_c[None, :]
    w_ptrs = w_down_ptr + offs_r[None, :] * N + offs_c[:, None]
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
            a = dot(held[i], tl.load(w_ptrs + i * BLOCK_C, mask=mask_w, other=0.0), a)
    else:
        for c in range(0, N, BLOCK_C):
            mask_c = offs_c < N - c
            h = tl.load(h_ptrs + c, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
            w_down = tl.load(w_ptrs + c, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
            a = dot(h, w_down, a)
    if b_down_ptr is not None:
        a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    # an infinite h times the zeros beyond the rank is NaN there
    z = tl.where(mask_r[None, :], activate(a, ACT) * scale, 0.0).to(y_ptr.dtype.element_ty)
    if CHUNKS > 0:
        for i in tl.static_range(CHUNKS):
            store_columns(
                held[i], i * BLOCK_C, z, w_up_ptr, b_up_ptr, scale, y_ptr, rows, mask_m,
                offs_c, offs_r, mask_r, N, R, stride_ym,
            )  # fmt: skip
    else:
        for c in range(0, N, BLOCK_C):
            mask = mask_m[:, None] & (offs_c < N - c)[None, :]
            residual_ptrs = residual_ptr + rows * stride_residual_m + (c + offs_c)[None, :]
            store_columns(
                tl.load(residual_ptrs, mask=mask, other=0.0), c, z, w_up_ptr, b_up_ptr, scale,
                y_ptr, rows, mask_m, offs_c, offs_r, mask_r, N, R, stride_ym,
            )  # fmt: skip


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
    mask_m = offs_l < rows_per_sample
    rows = (sample * rows_per_sample + offs_l).to(tl.int64)[:, None]

    k = tl.load(index_ptr + sample)
    if k == -1:
        for c in range(0, N, BLOCK_C):
            offs_n = c + tl.arange(0, BLOCK_C)
            mask = mask_m[:, None] & (offs_n < N)[None, :]
            x = tl.load(
                residual_ptr + rows * stride_residual_m + offs_n[None, :], mask=mask, other=0.0
            )
            tl.store(y_ptr + rows * stride_ym + offs_n[None, :], x, mask=mask)
    else:
        inside = (k >= 0) & (k < adapters)
        # an adapter that is not there must show, and nothing be read beside the bank
        scale = tl.load(scale_ptr + k, mask=inside, other=float("nan"))
        place = tl.where(inside, k, 0).to(tl.int64)
        adapted_rows(
            h_ptr, residual_ptr, y_ptr,
            w_down_ptr + place * R * N, w_up_ptr + place * R * N,
            None if b_down_ptr is None else b_down_ptr + place * R,
            None if b_up_ptr is None else b_up_ptr + place * N,
            scale, rows, mask_m, N, R, stride_hm, stride_residual_m, stride_ym,
            ACT, CHUNKS, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip


_TILES = ((64, 64, 4, 3), (32, 64, 4, 4))
# for more than 64 ranks: the sums of 64 rows fill the registers of 4 warps
_TILES_WIDE = ((32, 64, 4, 4), (64, 64, 8, 3))
_TILES_FP32 = ((32, 32, 8, 2), (16, 32, 4, 2))
# chunks of 64 columns that stay on chip: the U-Nets' widths of 320, 640 and 1280
_HELD = (5, 10, 20)


def bank_configs(itemsize: int, block_r: int, capability: int) -> list[Config]:
    """Those that read h twice, then those that hold rows of the listed widths."""
    found = []
    tiles = _TILES if block_r <= 64 else _TILES_WIDE
    for block_m, block_c, num_warps, num_stages in _TILES_FP32 if itemsize == 4 else tiles:
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
