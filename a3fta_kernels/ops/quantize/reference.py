"""The specification of `quantize` and `dequantize` in eager PyTorch. The protocol: contract.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rule import acc_dtype
from .layout import BLOCK, LARGEST, SMALLEST_HALF, range_count


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes (n,) int8 and ranges (blocks, 2) bf16 = [mid, half] of x (n,)."""
    if x.numel() == 0:
        return x.new_empty(0, dtype=torch.int8), x.new_empty(0, 2, dtype=torch.bfloat16)
    wide = x.to(acc_dtype(x.dtype))
    # a short last block is filled up with its last element, which moves neither lo nor hi
    full = range_count(x.numel()) * BLOCK
    blocks = F.pad(wide, (0, full - x.numel())).view(-1, BLOCK)
    blocks[-1, BLOCK - (full - x.numel()) :] = wide[-1]
    lo, hi = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    # halves first: lo + hi may be more than the dtype holds
    mid = saturated((0.5 * lo + 0.5 * hi).bfloat16().to(wide.dtype))
    half = rounded_up(torch.maximum(hi - mid, mid - lo))
    # NaN stands for a block that holds NaN, infinity or what bf16 does not reach
    lost = ~((hi - mid).isfinite() & (mid - lo).isfinite() & (half < torch.inf))
    mid, half = (t.masked_fill(lost, torch.nan) for t in (mid, half))
    scale = torch.where(half > 0, 127 / half, 0)
    codes = ((blocks - mid) * scale).round().nan_to_num(0)
    ranges = torch.cat([mid, half], 1).bfloat16()
    return codes.to(torch.int8).view(-1)[: x.numel()].clone(), ranges


def dequantize(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """mid + half * code / 127 (n,) in `dtype` for codes (n,) int8 and their ranges."""
    if codes.numel() == 0:
        return codes.new_empty(0, dtype=dtype)
    wide = acc_dtype(dtype)
    mid, half = ranges.to(wide).repeat_interleave(BLOCK, 0)[: codes.numel()].unbind(1)
    largest = torch.finfo(dtype).max
    # rounding may not make infinity of a finite block
    return (mid + half / 127 * codes.to(wide)).clamp(-largest, largest).to(dtype)


def saturated(x: Tensor) -> Tensor:
    """bf16's rounding carries the largest fp32 numbers to infinity: its largest number instead."""
    return x.clamp(-LARGEST, LARGEST)


def rounded_up(x: Tensor) -> Tensor:
    """The least bf16 number not below x >= 0, in x's dtype; at least SMALLEST_HALF unless x is 0.

    Between bf16's largest number and fp32's, bf16's: the last code is then off by less than half a
    step. Infinity beyond.
    """
    narrow = x.float()
    bits = narrow.view(torch.int32) & ~0xFFFF
    bits = torch.where(bits.view(torch.float32).to(x.dtype) < x, bits + 0x10000, bits)
    up = bits.view(torch.float32).to(x.dtype)
    up = torch.where((narrow < torch.inf) & (up > LARGEST), LARGEST, up)
    return torch.where(x > 0, up.clamp(min=SMALLEST_HALF), up)
