"""Cosmos: `attn1.to_out[0]` reads self-attention, `attn2.to_out[0]` attention to the text; where an
image is given too, the sum of attention to the text and to the image.
"""

from __future__ import annotations

from .clock import cosmos
from .family import Family

FAMILY = Family("cosmos", ("CosmosTransformerBlock",), cosmos)
