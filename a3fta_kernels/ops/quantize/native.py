"""`quantize` and `dequantize` in the compiled library, on the CPU and on CUDA.

The protocol is in contract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import load_native

load_native()

_quantize = torch.ops.a3fta_native.quantize.default
_dequantize = torch.ops.a3fta_native.dequantize.default


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """codes (n,) and ranges (blocks, 2) of x (n,)."""
    return _quantize(x)


def dequantize(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """x~ (n,) of `dtype`."""
    return _dequantize(codes, ranges, dtype)
