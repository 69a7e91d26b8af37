"""The RMS norm of diffusers, frozen: of all that its formula makes in float32 the input is kept.

y = x r w + b,   r = 1 / sqrt(mean(x^2) + eps), per row, in float32
dx = g r - (r^3 sum(g x) / C) x,   g = dy w
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from .. import ops
from ..ops.rule import refuse_second_derivative
from .swapping import LeanModule, trains


class LeanRMSNorm(LeanModule, RMSNorm):
    """y as RMSNorm has it, to the bit."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        stock = torch.compiler.is_compiling() or not torch.is_grad_enabled()
        if stock or not hidden_states.requires_grad or trains(self):
            return RMSNorm.forward(self, hidden_states)
        return FrozenRMSNorm.apply(hidden_states, self, self.settings.norms)


class FrozenRMSNorm(torch.autograd.Function):
    """keep: of `ops.validate.KEEPS`. Beside the input r is kept, a number for each row."""

    operator = "rms_norm"

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, keep: str) -> Tensor:
        r = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps)
        kept = ops.quantize(x) if keep == "int8" else (x,)
        ctx.saved_names = (*(("codes", "ranges") if keep == "int8" else ("x",)), "r", "weight")
        ctx.save_for_backward(*kept, r, norm.weight)
        ctx.dtype = x.dtype
        return RMSNorm.forward(norm, x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        x, *ranges, r, weight = ctx.saved_tensors
        if ranges:
            x = ops.dequantize(x, ranges[0], ctx.dtype)
        g = grad_outputs[0] if weight is None else grad_outputs[0] * weight
        g = g.to(torch.promote_types(x.dtype, r.dtype))
        # the order of operations, and where they round, is autograd's of the stock formula
        dr = (g * x).sum(-1, keepdim=True).to(r.dtype)
        through = (-0.5 * dr * r.pow(3) / x.shape[-1]) * (2 * x.float())
        return (g * r).to(x.dtype) + through.to(x.dtype), None, None


def why_not(norm: RMSNorm) -> str | None:
    if len(norm.dim) != 1:
        return f"it normalises over {len(norm.dim)} dimensions"
    return None
