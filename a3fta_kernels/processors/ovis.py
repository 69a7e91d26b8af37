"""Ovis-Image: blocks as Flux's, dual and single; the feed-forward beside attention is gated."""

from __future__ import annotations

from . import flux
from .clock import share

FAMILY = flux.family("ovis", share, "OvisImageTransformerBlock", "OvisImageSingleTransformerBlock")
