"""SANA-Video: `attn1.to_out[0]` reads linear attention of the video to itself, computed in float32
and cast back; `attn2.to_out[0]` softmax attention to the text.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("sana_video", ("SanaVideoTransformerBlock",), steps)
