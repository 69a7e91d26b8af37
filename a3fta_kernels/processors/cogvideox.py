"""CogVideoX: `attn1.to_out[0]` reads the attention of text and video, one sequence."""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("cogvideox", ("CogVideoXBlock",), steps)
