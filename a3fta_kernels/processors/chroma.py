"""Chroma: Flux's attention in blocks whose modulation one network computes for all."""

from __future__ import annotations

from . import flux
from .clock import share

FAMILY = flux.family("chroma", share, "ChromaTransformerBlock", "ChromaSingleTransformerBlock")
