"""Bria and Bria FIBO: blocks as Flux's, dual and single."""

from __future__ import annotations

from . import flux
from .clock import steps

FAMILY = flux.family(
    "bria", steps, "BriaTransformerBlock", "BriaSingleTransformerBlock", "BriaFiboTransformerBlock",
    "BriaFiboSingleTransformerBlock",
)  # fmt: skip
