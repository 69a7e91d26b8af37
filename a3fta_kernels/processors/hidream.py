"""HiDream: `attn1.to_out` (image) and `attn1.to_out_t` (text) are linear layers, not lists.

Single blocks, of both streams in one, have `to_out` alone. Experts of the feed-forward choose by
token: how many tokens an expert gets depends on the adapter too.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family(
    "hidream", ("HiDreamImageTransformerBlock", "HiDreamImageSingleTransformerBlock"), steps
)
