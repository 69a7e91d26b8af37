"""Small models of every family, by name."""

from __future__ import annotations

from . import pixart
from .small import Small

ZOO: dict[str, Small] = {
    **pixart.MODELS,
}
