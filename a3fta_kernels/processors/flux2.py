"""Flux2: dual blocks as Flux's; in single blocks the attention layer holds the feed-forward.

There `to_out` reads attention, in its first columns, and the feed-forward's hidden layer beside it
(`Flux2ParallelSelfAttnProcessor` concatenates them); the adapter acts on the former.
"""

from __future__ import annotations

from collections.abc import Iterator

from diffusers.models.transformers.transformer_flux2 import Flux2ParallelSelfAttention
from torch import nn

from . import family
from .clock import share
from .family import Family, Site


def sites(model: nn.Module) -> Iterator[Site]:
    for site in family.sites(model):
        if isinstance(site.attention, Flux2ParallelSelfAttention):
            site = site._replace(columns=(0, site.attention.inner_dim))
        yield site


FAMILY = Family("flux2", ("Flux2TransformerBlock", "Flux2SingleTransformerBlock"), share, sites)
