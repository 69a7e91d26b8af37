"""Frozen normalisations outside other lean modules: what they keep can be 8 bits wide."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops
from .swapping import LeanModule, trains


class LeanGroupNorm(LeanModule, nn.GroupNorm):
    """`ops.group_norm` in place of nn.GroupNorm."""

    def forward(self, input: Tensor) -> Tensor:
        if trains(self):
            return nn.GroupNorm.forward(self, input)
        return ops.group_norm(
            input, self.num_groups, self.weight, self.bias, eps=self.eps, keep=self.settings.norms
        )


class LeanLayerNorm(LeanModule, nn.LayerNorm):
    """`ops.layer_norm` in place of nn.LayerNorm over the last dimension."""

    def forward(self, input: Tensor) -> Tensor:
        if trains(self):
            return nn.LayerNorm.forward(self, input)
        return ops.layer_norm(input, self.weight, self.bias, eps=self.eps, keep=self.settings.norms)


def why_not(norm: nn.LayerNorm) -> str | None:
    if len(norm.normalized_shape) != 1:
        return f"it normalises over {len(norm.normalized_shape)} dimensions"
    return None
