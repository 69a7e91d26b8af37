"""The bottleneck with one learned factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter, Tensors


class RescaledAdapter(BottleneckAdapter):
    """The parameters of  h' = h + scale * s * (act(h @ w_down.T + b_down) @ w_up.T + b_up).

    s (1,): one learned number per layer, one at the start. w_up and b_up start at zero as in the
    bottleneck, and s has a gradient once they have moved.

    A scaling factor on an adapter: He et al., "Towards a Unified View of Parameter-Efficient
    Transfer Learning" (ICLR 2022).
    """

    def extend(self, options: dict[str, Any]) -> None:
        # of one dimension, because sharded training takes no scalars
        self.s = nn.Parameter(torch.ones(1, **options))

    def forward(self, h: Tensor | None = None) -> Tensors:
        return super().forward(h).times(self.s)
