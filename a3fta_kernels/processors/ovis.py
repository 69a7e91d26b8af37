"""Ovis-Image: blocks as Flux's, dual and single; the feed-forward beside attention is gated."""

from __future__ import annotations

from . import flux

FAMILY = flux.family("ovis", "OvisImageTransformerBlock", "OvisImageSingleTransformerBlock")
