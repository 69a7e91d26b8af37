"""The bottleneck behind a gate between closed and open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter, Tensors


class HalfOpenAdapter(BottleneckAdapter):
    """The parameters of  h' = h + scale * g * (act(h @ w_down.T + b_down) @ w_up.T + b_up).

    g = sigmoid(gate), gate (1,): one number per layer between 0 and 1, a half at the start, so that
    a layer can be left out by degrees and its share be read off. w_up and b_up start at zero as in
    the bottleneck, and the gate has a gradient once they have moved.

    Sigmoid gates on a residual branch: Srivastava et al., "Highway Networks" (2015); one number per
    adapter rather than one per feature and input: Mao et al., "UniPELT" (ACL 2022), whose gates
    read the input, which these do not.
    """

    def extend(self, options: dict[str, Any]) -> None:
        # of one dimension, because sharded training takes no scalars
        self.gate = nn.Parameter(torch.zeros(1, **options))

    def forward(self, h: Tensor | None = None) -> Tensors:
        return super().forward(h).times(self.gate.sigmoid())
