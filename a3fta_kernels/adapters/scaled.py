"""The bottleneck with a learned factor per channel of its output."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter, Tensors


class ScaledAdapter(BottleneckAdapter):
    """The parameters of  h' = h + scale * s * (act(h @ w_down.T + b_down) @ w_up.T + b_up).

    s (C,): a learned factor per channel, one at the start. w_up and b_up start at zero as in the
    bottleneck, and s has a gradient once they have moved.

    Factors per channel on a residual branch: Touvron et al., "Going deeper with Image
    Transformers" (ICCV 2021), as LayerScale; as what fine-tuning learns: Liu et al., "Few-Shot
    Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (NeurIPS 2022).
    """

    def extend(self, options: dict[str, Any]) -> None:
        self.s = nn.Parameter(torch.ones(len(self.w_up), **options))

    def forward(self, h: Tensor | None = None) -> Tensors:
        return super().forward(h).times(self.s)
