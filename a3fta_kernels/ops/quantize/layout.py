"""What every backend of `quantize` agrees on: blocks, ranges, and tensors seen in memory order."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128  # elements that share a range
LARGEST = torch.finfo(torch.bfloat16).max
# 127 / half stays finite in fp32
SMALLEST_HALF = 2.0**-120


def range_count(n: int) -> int:
    """Blocks of n elements."""
    return (n + BLOCK - 1) // BLOCK


def is_dense(x: Tensor) -> bool:
    """Whether x fills its memory without gaps or overlaps, in any order of its axes."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(
        (stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(x: Tensor) -> Tensor:
    """x itself where it is dense, else a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def in_memory_order(x: Tensor) -> Tensor:
    """A dense x as a vector (n,)."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def laid_out_like(flat: Tensor, x: Tensor) -> Tensor:
    """`flat` (n,) with the shape and strides of the dense x."""
    return flat.view(x.shape) if x.is_contiguous() else flat.as_strided(x.shape, x.stride())
