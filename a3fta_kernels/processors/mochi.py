"""Mochi: `attn1.to_out[0]` reads the video's attention, `attn1.to_add_out` the text's, which the
last block does not have.

The layers are of a class of their own. The pooling of the text beside the timestep, which attends
with one query, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.attention_processor import MochiAttention
from torch import nn

from .clock import steps_left
from .family import Family, Site, outputs


def sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if isinstance(module, MochiAttention):
            yield Site(name, module, outputs(name, module))


FAMILY = Family("mochi", ("MochiTransformerBlock",), steps_left, sites)
