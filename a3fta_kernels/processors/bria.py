"""Bria and Bria FIBO: blocks as Flux's, dual and single."""

from __future__ import annotations

from . import flux

FAMILY = flux.family(
    "bria", "BriaTransformerBlock", "BriaSingleTransformerBlock", "BriaFiboTransformerBlock",
    "BriaFiboSingleTransformerBlock",
)  # fmt: skip
