"""Allegro: `attn1.to_out[0]` reads self-attention, `attn2.to_out[0]` attention to the text."""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("allegro", ("AllegroTransformerBlock",), steps)
