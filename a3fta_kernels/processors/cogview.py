"""CogView3-Plus and CogView4: text and image attend as one stream, through `attn1.to_out[0]`."""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("cogview", ("CogView3PlusTransformerBlock", "CogView4TransformerBlock"), steps)
