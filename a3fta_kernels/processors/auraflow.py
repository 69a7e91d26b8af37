"""AuraFlow: joint blocks hand over to `attn.to_out[0]` (image) and `attn.to_add_out` (text).

Single blocks, of both streams in one, have `attn.to_out[0]` alone.
"""

from __future__ import annotations

from .clock import share
from .family import Family

FAMILY = Family(
    "auraflow", ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"), share
)
