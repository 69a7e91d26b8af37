"""The bottleneck with its inner features shifted and scaled by the timestep."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .bottleneck import BottleneckAdapter
from .timestep import WIDTH, Moment


class FilmAdapter(BottleneckAdapter):
    """Time-aware, by fusion:

        z  = act(h @ w_down.T + b_down) * (1 + gamma) + beta,   [gamma, beta] = e(t) @ w_time.T
        h' = h + scale * (z @ w_up.T + b_up)

    e(t) (WIDTH,): sines and cosines of the timestep; w_time (2R, WIDTH), zero at the start: a new
    adapter is the bottleneck, at all timesteps the same.

    The published one: Moon et al., "Fine-Tuning Diffusion Models with Limited Data" (NeurIPS 2022
    workshop), which combines the adapter's features with the model's time embedding. Ours differs
    in two things. It embeds the timestep itself: so it needs no part of the model, and serves every
    denoiser. And it modulates the R features inside the bottleneck, after the activation, which
    the fused ops do on the way, as Perez et al., "FiLM" (AAAI 2018), do with features.
    """

    timed = True
    rank_axes: ClassVar = {**BottleneckAdapter.rank_axes, "w_time": (0, 2)}  # gamma's, beta's

    def extend(self, options: dict[str, Any]) -> None:
        self.w_time = nn.Parameter(torch.zeros(2 * self.rank, WIDTH, **options))

    def at_time(self, moment: Moment) -> tuple[Tensor, Tensor | None]:
        both = moment.embedding.to(self.w_time) @ self.w_time.T
        return both[:, : self.rank], both[:, self.rank :]
