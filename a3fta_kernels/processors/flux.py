"""The Flux family: every model built on Flux's blocks (FluxTransformer2DModel, its ControlNet).

Dual blocks hand attention over in two: the image's to `attn.to_out[0]`, the text's to
`attn.to_add_out`. Single blocks have no output layer of their own: the block's `proj_out` reads
attention, in its first columns, and the feed-forward beside it; the adapter acts on the former.

There are no processors here. Flux's own call these layers as modules, which is all that adapters
need, and have no parameters in the projections' way; whichever a layer has, it stays.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from .family import Family, Site


def sites(model: nn.Module) -> Iterator[Site]:
    for name, block in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(block, FluxTransformerBlock):
            outputs = {"to_out.0": block.attn.to_out[0], "to_add_out": block.attn.to_add_out}
            found = {f"{prefix}attn.{output}": layer for output, layer in outputs.items()}
            yield Site(f"{prefix}attn", block.attn, found)
        elif isinstance(block, FluxSingleTransformerBlock):
            columns = (0, block.attn.inner_dim)
            yield Site(f"{prefix}attn", block.attn, {f"{prefix}proj_out": block.proj_out}, columns)


FAMILY = Family("flux", ("FluxTransformerBlock", "FluxSingleTransformerBlock"), sites)
