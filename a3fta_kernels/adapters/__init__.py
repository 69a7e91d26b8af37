"""Adapters: one file per design. `DESIGNS` maps the name in a config to the module."""

from __future__ import annotations

from .bottleneck import BottleneckAdapter
from .config import AdapterConfig
from .gated import GatedAdapter
from .scaled import ScaledAdapter

DESIGNS: dict[str, type[BottleneckAdapter]] = {
    "bottleneck": BottleneckAdapter,
    "gated": GatedAdapter,
    "scaled": ScaledAdapter,
}

__all__ = ["DESIGNS", "AdapterConfig", "BottleneckAdapter", "GatedAdapter", "ScaledAdapter"]
