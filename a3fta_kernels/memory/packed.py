"""Linear layers of 4 bits per weight where memory is counted: what they hold, make and keep.

They stand for bitsandbytes' NF4 with double quantization, which `a3fta finetune --quantize nf4`
trains on, and compute nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

QUANTIZE = ("no", "nf4")
_BLOCK, _BLOCKS = 64, 256  # weights that share a scale of 8 bits, scales that share one in float32


class PackedLinear(nn.Linear):
    """weight: two values of 4 bits in a byte; scales and scales_of_scales: of its blocks."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device=linear.weight.device)

        values = linear.weight.numel()
        scales = -(-values // _BLOCK)
        self.weight = nn.Parameter(empty(-(-values // 2), torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scales", empty(scales, torch.uint8))
        self.register_buffer("scales_of_scales", empty(-(-scales // _BLOCKS), torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, self.out_features)


class _Product(torch.autograd.Function):
    """y = x W^T + b; W is unpacked for the product and again for the backward's, x is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.inputs = x.shape[-1]
        return nn.functional.linear(x, x.new_empty(outputs, x.shape[-1]), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (_,) = ctx.saved_tensors
        return dy @ dy.new_empty(dy.shape[-1], ctx.inputs), None, None, None


def pack(model: nn.Module, kind: str) -> None:
    """Replaces every plain linear layer of `model` by a packed one; kind: of QUANTIZE."""
    if kind == "no":
        return
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, PackedLinear(layer))
