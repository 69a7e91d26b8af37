"""Processors: strategies that compute attention and hand its output to the projection.

They own no parameters. One file per family of models; `FAMILIES` in the order they are asked.
"""

from __future__ import annotations

from torch import nn

from . import flux, pixart, unet
from .family import Family, Site, class_names
from .unet import A3FTAAttnAddedKVProcessor, A3FTAAttnProcessor, A3FTAFusedAttnProcessor

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *unet.FAMILIES,
        pixart.FAMILY,
        flux.FAMILY,
        unet.ATTENTION,
    )
}


def family_of(model: nn.Module) -> Family | None:
    """The first family that the model belongs to."""
    names = class_names(model)
    return next((f for f in FAMILIES.values() if not names.isdisjoint(f.holds)), None)


__all__ = [
    "FAMILIES",
    "A3FTAAttnAddedKVProcessor",
    "A3FTAAttnProcessor",
    "A3FTAFusedAttnProcessor",
    "Family",
    "Site",
    "family_of",
]
