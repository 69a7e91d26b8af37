"""Frozen convolutions: they keep no input."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .. import ops
from .swapping import LeanModule, trains


class LeanConv2d(LeanModule, nn.Conv2d):
    """`ops.frozen_conv` in place of nn.Conv2d."""

    def forward(self, input: Tensor) -> Tensor:
        if trains(self):
            return nn.Conv2d.forward(self, input)
        return ops.frozen_conv(
            input, self.weight, self.bias, stride=self.stride,
            padding=cast(tuple[int, ...], self.padding), dilation=self.dilation,
            groups=self.groups,
        )  # fmt: skip


def why_not(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"padding {conv.padding!r} of mode {conv.padding_mode!r}"
    return None
