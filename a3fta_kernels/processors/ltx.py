"""LTX-Video and LTX-2: `to_out[0]` of every attention layer.

In LTX-2 that is video and audio attending to themselves, to the text and to each other. With gates
(`gated_attn`) the layer, and so the adapter, reads attention times a gate per head.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILIES = (
    Family("ltx", ("LTXVideoTransformerBlock",), steps),
    Family("ltx2", ("LTX2VideoTransformerBlock",), steps),
)
