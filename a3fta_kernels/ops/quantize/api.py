"""The public `quantize` and `dequantize`: checks and the choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import resolve
from ...checks import check_device, check_dtype, check_shape, check_tensor, describe
from ..validate import FLOATS
from . import contract
from .layout import is_dense, range_count


def quantize(x: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """x in 8 bits: codes from the middle of a range, one range for each 128 elements in memory.

        mid  = bf16((min + max) / 2);  half = bf16(max(max - mid, mid - min)), rounded up
        code = round((x - mid) / half * 127)

    Args:
        x: any shape; fp32, fp16, bf16 or fp64. Where x fills its memory without gaps (contiguous,
            channels_last, any order of axes) the codes have its strides; otherwise they are
            contiguous. May be empty.
        backend: auto, reference, triton or native.

    Returns:
        codes, int8 of x's shape, and ranges, bf16 (blocks, 2) = [mid, half]: 4 bytes a block.

    Raises:
        TypeError: x is no tensor, or of another dtype.
        BackendUnavailableError: the named backend cannot run here.

    What comes back differs from x by half / 254 at most, before its own rounding; half is 0, or
    2^-120 at least. A block with a NaN or an infinity comes back as NaN, as does a float64 block
    wider than bf16 reaches (3.4e38). Not differentiable: x is taken as a constant.
    """
    check_tensor("x", x)
    check_dtype("x", x, FLOATS)
    x = x.detach()
    return contract.narrow(x, resolve(backend, x.device, x.dtype))


def dequantize(
    codes: Tensor, ranges: Tensor, dtype: torch.dtype, *, backend: str = "auto"
) -> Tensor:
    """x~ = mid + half * code / 127 for what `quantize` returned.

    Args:
        codes: int8 of any shape, without gaps in memory.
        ranges: bf16 (blocks, 2), a block for each 128 codes in memory, the last may be short.
        dtype: of the result: fp32, fp16, bf16 or fp64. A finite result that it does not hold
            becomes its largest number.
        backend: auto, reference, triton or native.

    Returns:
        x~, of the shape and strides of codes. Not differentiable.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendUnavailableError: the named backend cannot run here.
    """
    check_tensor("codes", codes)
    check_dtype("codes", codes, (torch.int8,))
    if not is_dense(codes):
        raise ValueError(
            "codes: expected a tensor without gaps in memory, as quantize returns it, got strides "
            f"{codes.stride()} for shape {tuple(codes.shape)}"
        )
    check_tensor("ranges", ranges)
    check_dtype("ranges", ranges, (torch.bfloat16,))
    check_shape("ranges", ranges, (range_count(codes.numel()), 2), "(blocks of 128 codes, 2)")
    check_device("ranges", ranges, codes.device, "codes")
    if dtype not in FLOATS:
        listing = ", ".join(map(str, FLOATS))
        raise TypeError(f"dtype: expected one of {listing}, got {describe(dtype)}")
    chosen = resolve(backend, codes.device, dtype)
    ranges = ranges.detach().contiguous()
    return contract.widen(codes, ranges, dtype, chosen)
