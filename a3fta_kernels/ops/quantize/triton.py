# mypy: allow-untyped-defs
"""`quantize` and `dequantize` in Triton, one kernel each. The protocol is in contract.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_support import AotKernel, Call, Config, Launcher, cdiv, config, rows_bucket
from . import layout
from .layout import range_count

BLOCK: tl.constexpr = tl.constexpr(layout.BLOCK)
LARGEST: tl.constexpr = tl.constexpr(layout.LARGEST)
SMALLEST_HALF: tl.constexpr = tl.constexpr(layout.SMALLEST_HALF)
LARGEST_FP16: tl.constexpr = tl.constexpr(65504.0)
LARGEST_FP32: tl.constexpr = tl.constexpr(3.4028234663852886e38)
INFINITY: tl.constexpr = tl.constexpr(float("inf"))
# 1.5 * 2^23: added and taken away, it leaves the nearest integer
ROUNDING: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def rounded(x):
    """The bf16 number nearest to a finite x, as fp32. By hand: the interpreter's cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def rounded_up(x):
    """The least bf16 number not below x >= 0, as fp32; at least SMALLEST_HALF unless x is 0."""
    bits = x.to(tl.int32, bitcast=True) & -65536
    up = bits.to(tl.float32, bitcast=True)
    above = (bits + 65536).to(tl.float32, bitcast=True)
    up = tl.minimum(tl.where(up < x, above, up), LARGEST)
    return tl.where(x > 0, tl.maximum(up, SMALLEST_HALF), up)


@triton.jit
def elements(n, BLOCK_B: tl.constexpr):
    """This program's blocks (BLOCK_B,) and their elements (BLOCK_B, BLOCK)."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs = offs_b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return offs_b, offs, offs < n


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, ranges_ptr, n, BLOCK_B: tl.constexpr):
    """x (n,) to codes (n,) and ranges (blocks, 2) = [mid, half]."""
    offs_b, offs, mask = elements(n, BLOCK_B)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    lo = tl.min(tl.where(mask, x, INFINITY), axis=1)
    hi = tl.max(tl.where(mask, x, -INFINITY), axis=1)
    lost = tl.max(tl.where(tl.abs(x) < INFINITY, 0, 1), axis=1) > 0
    # halves first: lo + hi may be more than fp32 holds; bf16's rounding may reach infinity
    mid = tl.minimum(tl.maximum(rounded(0.5 * lo + 0.5 * hi), -LARGEST), LARGEST)
    half = rounded_up(tl.maximum(hi - mid, mid - lo))
    scale = tl.where(half > 0, 127.0 / tl.where(half > 0, half, 1.0), 0.0)
    codes = (x - mid[:, None]) * scale[:, None] + ROUNDING - ROUNDING
    codes = tl.where(lost[:, None], 0.0, codes)
    tl.store(codes_ptr + offs, codes.to(tl.int32).to(tl.int8), mask=mask)
    inside = offs_b * BLOCK < n
    range_ptrs = ranges_ptr + 2 * offs_b
    tl.store(range_ptrs, tl.where(lost, float("nan"), mid).to(tl.bfloat16), mask=inside)
    tl.store(range_ptrs + 1, tl.where(lost, float("nan"), half).to(tl.bfloat16), mask=inside)


@triton.jit
def dequantize_kernel(codes_ptr, ranges_ptr, x_ptr, n, BLOCK_B: tl.constexpr):
    """x (n,) = mid + half * code / 127."""
    offs_b, offs, mask = elements(n, BLOCK_B)
    inside = offs_b * BLOCK < n
    range_ptrs = ranges_ptr + 2 * offs_b
    mid = tl.load(range_ptrs, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(range_ptrs + 1, mask=inside, other=0.0).to(tl.float32) / 127.0
    codes = tl.load(codes_ptr + offs, mask=mask, other=0).to(tl.float32)
    x = mid[:, None] + step[:, None] * codes
    # rounding may not make infinity of a finite block; NaN passes the comparisons
    if x_ptr.dtype.element_ty == tl.float16:
        x = tl.where(x > LARGEST_FP16, LARGEST_FP16, tl.where(x < -LARGEST_FP16, -LARGEST_FP16, x))
    elif x_ptr.dtype.element_ty == tl.bfloat16:
        x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    else:
        x = tl.where(x > LARGEST_FP32, LARGEST_FP32, tl.where(x < -LARGEST_FP32, -LARGEST_FP32, x))
    tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


def configs(itemsize: int, fixed_block: int, capability: int) -> list[Config]:
    """Sixteen codes a thread, a vector of 16 bytes, or eight."""
    return [config(warps, 1, BLOCK_B=blocks) for blocks, warps in ((16, 4), (8, 4), (32, 8))]


launch_quantize = Launcher(quantize_kernel, configs)
launch_dequantize = Launcher(dequantize_kernel, configs)

AOT_KERNELS = tuple(
    AotKernel(
        launcher,
        pointers={"codes_ptr": "i8", "ranges_ptr": "bf16"},
        fixed_blocks=(0,),
        products=False,
    )
    for launcher in (launch_quantize, launch_dequantize)
)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes (n,) and ranges (blocks, 2) of x (n,)."""
    n = x.numel()
    codes = x.new_empty(n, dtype=torch.int8)
    ranges = x.new_empty(range_count(n), 2, dtype=torch.bfloat16)
    _launch(launch_quantize, x, n, x_ptr=x, codes_ptr=codes, ranges_ptr=ranges)
    return codes, ranges


def dequantize(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """x~ (n,) of `dtype`."""
    n = codes.numel()
    x = codes.new_empty(n, dtype=dtype)
    _launch(launch_dequantize, x, n, codes_ptr=codes, ranges_ptr=ranges, x_ptr=x)
    return x


def _launch(launcher: Launcher, like: Tensor, n: int, **arguments: Tensor) -> None:
    if n == 0:
        return

    def plan(meta: dict[str, int]) -> Call:
        return (cdiv(range_count(n), meta["BLOCK_B"]),), dict(arguments, n=n)

    launcher(plan, like, 0, rows_bucket(n))
