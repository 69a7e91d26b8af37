"""EasyAnimate: `attn1.to_out[0]` reads the video's attention and, in the first blocks,
`attn1.to_add_out` the text's; in the others the former reads both.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("easyanimate", ("EasyAnimateTransformerBlock",), steps)
