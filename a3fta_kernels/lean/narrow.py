"""8-bit copies of what is kept: one call for eager tensors and for those of tracers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends import resolve
from ..ops.quantize import contract
from ..ops.rule import is_plain


def narrow(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and ranges, as `ops.quantize` makes them."""
    run: Callable = contract.quantize if is_plain(x) else torch.ops.a3fta.quantize
    return run(x, resolve("auto", x.device, x.dtype))


def widen(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    run: Callable = contract.dequantize if is_plain(codes) else torch.ops.a3fta.dequantize
    return run(codes, ranges, dtype, resolve("auto", codes.device, dtype))
