"""The activation of feed-forwards without a gate: what it keeps can be 8 bits wide."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GELU
from torch import Tensor

from .. import ops
from ..ops.rule import record, refuse_second_derivative
from .swapping import LeanModule


class LeanGELU(LeanModule, GELU):
    """gelu of the projection, of which an 8-bit copy is kept."""

    def gelu(self, gate: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and gate.requires_grad):
            return GELU.gelu(self, gate)
        return record(NarrowGELU, gate, self.approximate)


class NarrowGELU(torch.autograd.Function):
    """y = gelu(x);  dx = dy gelu'(x~), x~ as `ops.quantize` keeps x."""

    operator = "gelu"
    saved_names = ("codes", "ranges")

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(*ops.quantize(x))
        ctx.options = (x.dtype, approximate)
        return torch.nn.functional.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        dtype, approximate = ctx.options
        codes, ranges = ctx.saved_tensors
        x = ops.dequantize(codes, ranges, dtype)
        return torch.ops.aten.gelu_backward(grad_outputs[0], x, approximate=approximate), None
