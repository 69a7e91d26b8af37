"""HunyuanDiT and its ControlNets: self- and cross-attention, each with `to_out[0]`.

The attention that pools the text for the time embedding is another module
(HunyuanDiTAttentionPool) and stays as it is.
"""

from __future__ import annotations

from .clock import steps
from .family import Family

FAMILY = Family("hunyuan_dit", ("HunyuanDiTBlock",), steps)
