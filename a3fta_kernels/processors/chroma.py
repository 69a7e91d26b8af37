"""Chroma: Flux's attention in blocks whose modulation one network computes for all."""

from __future__ import annotations

from . import flux

FAMILY = flux.family("chroma", "ChromaTransformerBlock", "ChromaSingleTransformerBlock")
