"""The bottleneck behind a gate that starts closed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter, Tensors, drawn


class GatedAdapter(BottleneckAdapter):
    """The parameters of  h' = h + scale * g * (act(h @ w_down.T + b_down) @ w_up.T + b_up).

    g = tanh(gate), gate (1,): one learned number per layer, zero at the start. w_up starts as in a
    usual linear layer instead: a new adapter changes nothing, yet all of it is at work as soon as
    the gate opens, and until then the gate alone has a gradient.

    Gates that start at zero: Bachlechner et al., "ReZero is All You Need" (UAI 2021); with tanh,
    on layers added to a frozen model: Alayrac et al., "Flamingo" (NeurIPS 2022).
    """

    def extend(self, options: dict[str, Any]) -> None:
        with torch.no_grad():
            self.w_up.copy_(drawn(*self.w_up.shape))
        # of one dimension, because sharded training takes no scalars
        self.gate = nn.Parameter(torch.zeros(1, **options))

    def forward(self, h: Tensor | None = None) -> Tensors:
        return super().forward(h).times(self.gate.tanh())
