"""Adapters: one file per design. `DESIGNS` maps the name in a config to the module."""

from __future__ import annotations

from .bottleneck import BottleneckAdapter
from .config import AdapterConfig
from .film import FilmAdapter
from .gated import GatedAdapter
from .half_open import HalfOpenAdapter
from .rescaled import RescaledAdapter
from .scaled import ScaledAdapter
from .time_scaled import TimeScaledAdapter

DESIGNS: dict[str, type[BottleneckAdapter]] = {
    "bottleneck": BottleneckAdapter,
    "gated": GatedAdapter,
    "half_open": HalfOpenAdapter,
    "scaled": ScaledAdapter,
    "rescaled": RescaledAdapter,
    "film": FilmAdapter,
    "time_scaled": TimeScaledAdapter,
}

__all__ = [
    "DESIGNS",
    "AdapterConfig",
    "BottleneckAdapter",
    "FilmAdapter",
    "GatedAdapter",
    "HalfOpenAdapter",
    "RescaledAdapter",
    "ScaledAdapter",
    "TimeScaledAdapter",
]
