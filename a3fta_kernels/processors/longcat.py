"""LongCat-Image: blocks as Flux's, dual and single."""

from __future__ import annotations

from . import flux
from .clock import share

FAMILY = flux.family(
    "longcat", share, "LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"
)
