"""Processors: strategies that compute attention and hand its output to the projection.

They own no parameters. One file per family of models; `FAMILIES` in the order they are asked.
"""

from __future__ import annotations

from torch import nn

from . import flux, unet
from .family import Family, Site
from .unet import A3FTAAttnAddedKVProcessor, A3FTAAttnProcessor, A3FTAFusedAttnProcessor

FAMILIES: dict[str, Family] = {family.name: family for family in (*unet.FAMILIES, flux.FAMILY)}


def family_of(model: nn.Module) -> Family | None:
    """The first family that the model belongs to."""
    return next((family for family in FAMILIES.values() if family.matches(model)), None)


__all__ = [
    "FAMILIES",
    "A3FTAAttnAddedKVProcessor",
    "A3FTAAttnProcessor",
    "A3FTAFusedAttnProcessor",
    "Family",
    "Site",
    "family_of",
]
