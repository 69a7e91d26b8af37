"""Flux, and every model built on its blocks: Kontext, Fill, its ControlNet.

Dual blocks hand attention over in two: the image's to `attn.to_out[0]`, the text's to
`attn.to_add_out`. Single blocks have no output layer of their own: the block's `proj_out` reads
attention, in its first columns, and the feed-forward beside it; the adapter acts on the former.

There are no processors here. Flux's own call these layers as modules, which is all that adapters
need, and have no parameters in the projections' way; whichever a layer has, it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .clock import Clock, share
from .family import Family, Site, is_attention, outputs


def sites(model: nn.Module) -> Iterator[Site]:
    for name, block in model.named_modules():
        prefix = f"{name}." if name else ""
        attention: Any = getattr(block, "attn", None)
        if not is_attention(attention):
            continue
        if attention.pre_only:
            columns = (0, attention.inner_dim)
            yield Site(f"{prefix}attn", attention, {f"{prefix}proj_out": block.proj_out}, columns)
        else:
            yield Site(f"{prefix}attn", attention, outputs(f"{prefix}attn", attention))


def family(name: str, timesteps: Clock, *holds: str) -> Family:
    """Of blocks as Flux's: `proj_out` of a single block reads (attention, feed-forward)."""
    return Family(name, holds, timesteps, sites)


FAMILY = family("flux", share, "FluxTransformerBlock", "FluxSingleTransformerBlock")
