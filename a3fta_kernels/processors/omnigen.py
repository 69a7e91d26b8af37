"""OmniGen: a language model's blocks; attention goes to `self_attn.to_out[0]`, without dropout."""

from __future__ import annotations

from .clock import share_left
from .family import Family

FAMILY = Family("omnigen", ("OmniGenBlock",), share_left)
