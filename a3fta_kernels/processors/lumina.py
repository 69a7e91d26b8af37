"""Lumina-Next and Lumina 2.

Lumina-Next adds self-attention and gated cross-attention head by head and hands the sum to
`attn2.to_out[0]`; `attn1` has no output layer (an Identity). Lumina 2 has `attn.to_out[0]`, in its
refiners too.
"""

from __future__ import annotations

from .clock import share_left
from .family import Family

FAMILY = Family("lumina", ("LuminaNextDiTBlock", "Lumina2TransformerBlock"), share_left)
