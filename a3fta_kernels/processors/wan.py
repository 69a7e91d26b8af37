"""Wan 2.1 and 2.2 and what is built like it: VACE, Animate, SkyReels V2, ChronoEdit.

`attn1.to_out[0]` of a block reads self-attention, `attn2.to_out[0]` attention to the text; of image
to video the sum of attention to the text and to the image. VACE's control blocks have the same two;
Animate's face blocks hand over to `to_out`.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family(
    "wan",
    (
        "WanTransformerBlock",
        "WanVACETransformerBlock",
        "WanAnimateFaceBlockCrossAttention",
        "SkyReelsV2TransformerBlock",
    ),
    steps,
)
