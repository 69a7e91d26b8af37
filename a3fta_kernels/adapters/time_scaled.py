"""The bottleneck with a factor that depends on the timestep."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter
from .timestep import WIDTH, Moment


class TimeScaledAdapter(BottleneckAdapter):
    """Time-aware, by one number per sample:

        z  = act(h @ w_down.T + b_down) * s(t),   s(t) = 1 + e(t) @ w_time.T
        h' = h + scale * (z @ w_up.T + b_up)

    e(t) (WIDTH,): sines and cosines of the timestep; w_time (1, WIDTH), zero at the start: a new
    adapter is the bottleneck, at all timesteps the same.

    The published one: time scaling of Moon et al., "Fine-Tuning Diffusion Models with Limited
    Data" (NeurIPS 2022 workshop), where the timestep weighs the adapter's output. Ours differs in
    that s(t) is made of the timestep itself, without the model's embedding, and weighs z: b_up is
    the same at all timesteps (bias=False has the factor on all of the output).
    """

    timed = True

    def extend(self, options: dict[str, Any]) -> None:
        self.w_time = nn.Parameter(torch.zeros(1, WIDTH, **options))

    def at_time(self, moment: Moment) -> tuple[Tensor, Tensor | None]:
        factor = moment.embedding.to(self.w_time) @ self.w_time.T
        return factor.expand(-1, self.rank), None
