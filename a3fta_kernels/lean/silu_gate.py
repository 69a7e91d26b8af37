"""The gated feed-forward of Z-Image: hidden layer and gate are kept, not their product's factors.

y = w2(silu(a) b),   a = w1(x), b = w3(x)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_z_image import FeedForward
from torch import Tensor

from ..ops.rule import refuse_second_derivative
from .swapping import LeanModule


class LeanFeedForward(LeanModule, FeedForward):
    """silu(a) is made again in the backward."""

    def _forward_silu_gating(self, x1: Tensor, x3: Tensor) -> Tensor:
        return gate(x1, x3)


def gate(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) b."""
    if torch.compiler.is_compiling():
        return F.silu(a) * b
    return SiLUGate.apply(a, b)


class SiLUGate(torch.autograd.Function):
    """y = silu(a) b;  da = dy b silu'(a),  db = dy silu(a)."""

    operator = "silu_gate"
    saved_names = ("a", "b")

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return F.silu(a) * b

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple:
        refuse_second_derivative()
        (dy,) = grad_outputs
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * b, a), dy * F.silu(a)
