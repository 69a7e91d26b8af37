"""What denoisers call a timestep, on the one scale of time-aware adapters: 0 clean, 1000 noise.

The rows of `FAMILIES` say what diffusers' pipelines hand to the forward. A scheduler that they do
not use may count otherwise (an EDM scheduler gives Stable Diffusion XL ln(sigma) / 4): there the
numbers are the scheduler's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# (what the forward was given, the model) -> the same on the scale of 0 to 1000. By name, so that a
# model with adapters pickles
Clock = Callable[[Tensor, nn.Module], Tensor]


def steps(t: Tensor, model: nn.Module) -> Tensor:
    """From 0 to 1000 (999) as it is."""
    return t


def share(t: Tensor, model: nn.Module) -> Tensor:
    """From 0 to 1, the share of noise."""
    return t * 1000


def share_left(t: Tensor, model: nn.Module) -> Tensor:
    """From 0, noise, to 1, clean."""
    return (1 - t) * 1000


def steps_left(t: Tensor, model: nn.Module) -> Tensor:
    """From 0, noise, to 1000, clean."""
    return 1000 - t


def log_sigma(t: Tensor, model: nn.Module) -> Tensor:
    """ln(sigma) / 4, of clean + sigma * noise: its share of noise is sigma / (1 + sigma), as in
    Cosmos 2's pipelines."""
    return (4 * t).sigmoid() * 1000


def cosmos(t: Tensor, model: nn.Module) -> Tensor:
    """Cosmos 1 has EDM's ln(sigma) / 4 and learned positions; 2 and 2.5 have neither."""
    first = _setting(model, "extra_pos_embed_type") is not None
    return log_sigma(t, model) if first else share(t, model)


def sana(t: Tensor, model: nn.Module) -> Tensor:
    """Steps, times `timestep_scale`; Sana Sprint, known by its guidance, has the share."""
    if _setting(model, "guidance_embeds"):
        return share(t, model)
    return t / (_setting(model, "timestep_scale") or 1)


def _setting(model: nn.Module, name: str) -> Any:
    return getattr(getattr(model, "config", None), name, None)
