"""Stable Audio Open: `attn1.to_out[0]` reads self-attention, `attn2.to_out[0]` attention to the
text, whose keys and values several heads share.
"""

from __future__ import annotations

from .clock import share
from .family import Family

FAMILY = Family("stable_audio", ("StableAudioDiTBlock",), share)
