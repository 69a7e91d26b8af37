"""Ovis-Image."""

from __future__ import annotations

import diffusers
from torch import nn

from .flux1 import COLUMNS, PROJECTIONS, SIZES, tokens
from .small import SHARE, Small


def make() -> nn.Module:
    return diffusers.OvisImageTransformer2DModel(**SIZES, axes_dims_rope=(4, 4, 8), out_channels=4)


MODELS = {"ovis": Small(make, tokens, "ovis", SHARE, PROJECTIONS, COLUMNS)}
