# mypy: allow-untyped-defs
"""`adapter_bank` in Triton: one kernel over the rows of all samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import (
    MAX_BLOCK_R,
    AotKernel,
    Call,
    Launcher,
    activate,
    cdiv,
    dot,
    rank_block,
    rows_bucket,
)
from ..activations import activation_code
from ..skinny_triton import rows_configs, up_tile

RANK_LIMIT = MAX_BLOCK_R  # a program holds all ranks of its rows


@triton.jit
def adapted_rows(
    h_ptr, residual_ptr, y_ptr, w_down_ptr, w_up_ptr, b_down_ptr, b_up_ptr, scale,
    rows, mask_m, N, R, stride_hm, stride_residual_m, stride_ym,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Stores residual + scale * adapter(h) for BLOCK_M rows."""
    offs_c = tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    h_ptrs = h_ptr + rows * stride_hm + offs_c[None, :]
    w_ptrs = w_down_ptr + offs_r[None, :] * N + offs_c[:, None]
    a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for c in range(0, N, BLOCK_C):
        mask_c = offs_c < N - c
        h = tl.load(h_ptrs + c, mask=mask_m[:, None] & mask_c[None, :], other=0.0)
        w_down = tl.load(w_ptrs + c, mask=mask_c[:, None] & mask_r[None, :], other=0.0)
        a = dot(h, w_down, a)
    if b_down_ptr is not None:
        a += tl.load(b_down_ptr + offs_r, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    # an infinite h times the zeros beyond the rank is NaN there
    z = tl.where(mask_r[None, :], activate(a, ACT) * scale, 0.0).to(y_ptr.dtype.element_ty)
    for c in range(0, N, BLOCK_C):
        offs_n = c + offs_c
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        residual_ptrs = residual_ptr + rows * stride_residual_m + offs_n[None, :]
        up_tile(
            tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32), z, w_up_ptr, b_up_ptr,
            scale, y_ptr, rows, mask_m, offs_n, offs_r, mask_r, N, R, stride_ym,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows_per_sample", "tiles_per_sample", "adapters"])
def bank_kernel(
    h_ptr, residual_ptr, w_down_ptr, w_up_ptr, b_down_ptr, b_up_ptr, scale_ptr, index_ptr, y_ptr,
    rows_per_sample, tiles_per_sample, adapters, N, R, stride_hm, stride_residual_m, stride_ym,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h, residual and y (M, N), w_down (adapters, R, N), w_up (adapters, N, R), index (B,).

    One program per BLOCK_M rows of one sample.
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
            ACT, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip


launch_bank = Launcher(bank_kernel, rows_configs)

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
    block_r = rank_block(rank)
    length = m // len(index)

    def plan(meta: dict[str, int]) -> Call:
        tiles = cdiv(length, meta["BLOCK_M"])
        return (len(index) * tiles,), dict(
            h_ptr=h, residual_ptr=residual, w_down_ptr=w_down, w_up_ptr=w_up, b_down_ptr=b_down,
            b_up_ptr=b_up, scale_ptr=scale, index_ptr=index, y_ptr=y, rows_per_sample=length,
            tiles_per_sample=tiles, adapters=adapters, N=n, R=rank, stride_hm=h.stride(0),
            stride_residual_m=residual.stride(0), stride_ym=n, ACT=activation_code(activation),
        )  # fmt: skip

    launch_bank(plan, h, block_r, rows_bucket(m), rows_bucket(length), n)
    return y
