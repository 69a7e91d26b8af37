"""ACE-Step 1.5: `self_attn.to_out[0]`, and `cross_attn.to_out[0]` of attention to text and lyrics.

Several heads share keys and values, so that the layers read more channels than q, k and v give.
"""

from __future__ import annotations

from .clock import share
from .family import Family

FAMILY = Family("ace_step", ("AceStepTransformerBlock",), share)
