"""LongCat-Image."""

from __future__ import annotations

import diffusers
from torch import nn

from .flux1 import COLUMNS, PROJECTIONS, SIZES, tokens
from .small import SHARE, Small


def make() -> nn.Module:
    return diffusers.LongCatImageTransformer2DModel(
        **SIZES, axes_dims_rope=[4, 4, 8], pooled_projection_dim=32
    )


MODELS = {"longcat": Small(make, tokens, "longcat", SHARE, PROJECTIONS, COLUMNS)}
