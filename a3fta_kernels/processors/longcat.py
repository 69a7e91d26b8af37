"""LongCat-Image: blocks as Flux's, dual and single."""

from __future__ import annotations

from . import flux

FAMILY = flux.family(
    "longcat", "LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"
)
