"""Qwen-Image (edit and layered variants, ControlNet): `attn.to_out[0]` and `attn.to_add_out`.

The last block has a text output that nothing reads: its adapter gets no gradient.
"""

from __future__ import annotations

from .clock import share
from .family import Family

FAMILY = Family("qwen", ("QwenImageTransformerBlock",), share)
