"""Noise as a model's schedule adds it: noisy input, what to predict, and the loss's weight.

A noise level is a number in 0..1, from clean to noise, whatever the model counts in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from .errors import TrainingError


class Noise(ABC):
    """A schedule. Levels are (B,) in 0..1; x, noise and what comes of them (B, C, H, W)."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels as training wants them."""

    @abstractmethod
    def time(self, level: Tensor) -> Tensor:
        """What the denoiser takes as its timestep."""

    @abstractmethod
    def noisy(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor: ...

    @abstractmethod
    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor: ...

    @abstractmethod
    def weight(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        """(B,): of each sample's squared error."""


class Diffusion(Noise):
    """DDPM's discrete times: x_t = sqrt(a_t) x + sqrt(1 - a_t) noise, drawn evenly."""

    def __init__(self, config: Any) -> None:
        from diffusers import DDPMScheduler

        self.scheduler: Any = DDPMScheduler.from_config(config)
        self.kind = self.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise TrainingError(
                f"the model's scheduler: expected prediction_type epsilon, v_prediction or "
                f"sample, got {self.kind!r}"
            )

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator)

    def time(self, level: Tensor) -> Tensor:
        last = int(self.scheduler.config.num_train_timesteps) - 1
        return (level * (last + 1)).long().clamp(max=last)

    def noisy(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return self.scheduler.add_noise(x, noise, self.time(level))

    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        if self.kind == "v_prediction":
            return self.scheduler.get_velocity(x, noise, self.time(level))
        return noise if self.kind == "epsilon" else x

    def weight(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        """min(SNR, gamma) times what the squared error of x is in that of the prediction
        (Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023)."""
        if snr_gamma is None:
            return torch.ones_like(level)
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self.scheduler, self.time(level))
        if self.kind == "epsilon":
            return (snr_gamma / snr).clamp(max=1)  # of pure noise, where SNR is 0, it is 1
        clipped = snr.clamp(max=snr_gamma)
        return clipped if self.kind == "sample" else clipped / (snr + 1)


class Flow(Noise):
    """Rectified flow: x_s = (1 - s) x + s noise, to predict noise - x.

    Levels are drawn logit-normal and shifted as the scheduler shifts its own (Esser et al.,
    "Scaling Rectified Flow Transformers", 2024); `scale` is what the denoiser counts to.
    """

    def __init__(self, config: Any, scale: float = 1000.0) -> None:
        # one that shifts by the image's size at sampling is trained without
        dynamic = bool(config.get("use_dynamic_shifting", False))
        self.shift = 1.0 if dynamic else float(config.get("shift", 1.0))
        self.scale = scale

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        level = torch.randn(count, generator=generator).sigmoid()
        return self.shift * level / (1 + (self.shift - 1) * level)

    def time(self, level: Tensor) -> Tensor:
        return level * self.scale

    def noisy(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        s = level.view(-1, *[1] * (x.ndim - 1))
        return (1 - s) * x + s * noise

    def target(self, x: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        return noise - x

    def weight(self, level: Tensor, snr_gamma: float | None) -> Tensor:
        if snr_gamma is not None:
            raise TrainingError(
                f"snr_gamma: expected none for a model of flow matching, got {snr_gamma:g}"
            )
        return torch.ones_like(level)
