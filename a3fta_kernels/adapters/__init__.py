"""Adapters: one file per design. `DESIGNS` maps the name in a config to the module."""

from __future__ import annotations

from .bottleneck import BottleneckAdapter
from .config import AdapterConfig

DESIGNS: dict[str, type[BottleneckAdapter]] = {"bottleneck": BottleneckAdapter}

__all__ = ["DESIGNS", "AdapterConfig", "BottleneckAdapter"]
