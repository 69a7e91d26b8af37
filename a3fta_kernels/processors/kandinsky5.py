"""Kandinsky 5: `out_layer` of every attention layer: of the text to itself, of the video to itself
and to the text.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .clock import steps
from .family import Family, Site, is_attention


def sites(model: nn.Module) -> Iterator[Site]:
    for name, module in model.named_modules():
        if is_attention(module):
            yield Site(name, module, {f"{name}.out_layer": module.out_layer})


FAMILY = Family(
    "kandinsky5",
    ("Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock"),
    steps,
    sites,
)
