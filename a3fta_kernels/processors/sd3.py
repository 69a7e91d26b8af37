"""SD3, SD3.5 and their ControlNet: text and image attend together.

The image's tokens go to `attn.to_out[0]`, the text's to `attn.to_add_out`, which the last block
has not: nothing reads its text. SD3.5's first blocks have a second attention of the image alone
(`attn2`); the ControlNet of SD3.5-large has blocks of the image alone.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("sd3", ("JointTransformerBlock", "SD3SingleTransformerBlock"), steps)
