"""`quantize` and `dequantize` for the rules of other ops: backend protocol and registration.

Over blocks of 128 consecutive elements in memory order, the last of which may be shorter:

    mid  = bf16((min + max) / 2)
    half = bf16(max(max - mid, mid - min)), rounded up
    code = round((x - mid) / half * 127)            int8; 0 where half is 0
    x~   = mid + half * code / 127                  |x~ - x| <= half / 254, then x~'s own rounding

Codes count from mid, so that an offset common to a block costs no precision. A block with a NaN or
an infinity gets NaN for mid and half: all of it comes back NaN. A finite block comes back finite.
`half` is 0 or at least 2^-120; numbers below 2^-126 may count as 0. Float64 blocks wider than bf16
reaches count as infinite.

A backend is a module with two functions, without autograd, on vectors (n,), n = 0 included:

    quantize(x) -> (codes (n,) int8, ranges (blocks, 2) bf16: [mid, half])
    dequantize(codes, ranges, dtype) -> x~ (n,) of `dtype`

Neither op is differentiable. `narrow` and `widen` are what the rules of other ops call: the
registered ops for tensors that are traced, their cheap eager entries for others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rule import is_plain, loader
from .layout import dense, in_memory_order, laid_out_like, range_count

backend_module = loader(__package__)


def quantize(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """codes, of x's shape and (where x is dense) strides, and ranges (blocks, 2)."""
    x = dense(x)
    codes, ranges = backend_module(backend).quantize(in_memory_order(x))
    return laid_out_like(codes, x), ranges


def dequantize(codes: Tensor, ranges: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """x~ of `dtype`, of the shape and strides of the dense codes."""
    x = backend_module(backend).dequantize(in_memory_order(codes), ranges, dtype)
    return laid_out_like(x, codes)


def narrow(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """`quantize`, also of a traced x."""
    if is_plain(x):
        return quantize(x, backend)
    return torch.ops.a3fta.quantize(x, backend)


def widen(codes: Tensor, ranges: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """`dequantize`, also of traced codes."""
    if is_plain(codes):
        return dequantize(codes, ranges, dtype, backend)
    return torch.ops.a3fta.dequantize(codes, ranges, dtype, backend)


_library = torch.library.Library("a3fta", "FRAGMENT")
_library.define("quantize(Tensor x, str backend) -> (Tensor codes, Tensor ranges)")
_library.define(
    "dequantize(Tensor codes, Tensor ranges, ScalarType dtype, str backend) -> Tensor x"
)
_library.impl("quantize", quantize, "CompositeExplicitAutograd")
_library.impl("dequantize", dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("a3fta::quantize", lib=_library)
def _(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    codes = torch.empty_like(dense(x), dtype=torch.int8)
    return codes, x.new_empty(range_count(x.numel()), 2, dtype=torch.bfloat16)


@torch.library.register_fake("a3fta::dequantize", lib=_library)
def _(codes: Tensor, ranges: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    return torch.empty_like(codes, dtype=dtype)
