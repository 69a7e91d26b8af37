"""Sana: linear self-attention (`SanaLinearAttnProcessor2_0`) and plain cross-attention.

Both hand over to `to_out[0]`. The linear one computes in fp32 and casts back before that.
"""

from __future__ import annotations

from .clock import sana
from .family import Family

FAMILY = Family("sana", ("SanaTransformerBlock",), sana)
