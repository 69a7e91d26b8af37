"""Allegro: `attn1.to_out[0]` reads self-attention, `attn2.to_out[0]` attention to the text.

The latter has the U-Nets' own processors, which ours replace.
"""

from __future__ import annotations

from . import unet

FAMILY = unet.family("allegro", "AllegroTransformer3DModel")
