"""OmniGen: a language model's blocks; attention goes to `self_attn.to_out[0]`, without dropout."""

from __future__ import annotations

from .family import Family

FAMILY = Family("omnigen", ("OmniGenBlock",))
