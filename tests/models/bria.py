"""Bria and Bria FIBO."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .flux1 import COLUMNS, PROJECTIONS, SIZES, tokens
from .small import STEPS, Draw, Small


def bria() -> nn.Module:
    return diffusers.BriaTransformer2DModel(**SIZES, axes_dims_rope=[4, 4, 8])


def fibo() -> nn.Module:
    """Half of the text's channels come from the text encoder's layers, one for each block."""
    return diffusers.BriaFiboTransformer2DModel(
        **SIZES, axes_dims_rope=[4, 4, 8], text_encoder_dim=16
    )


def fibo_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return tokens(draw, batch) | dict(text_encoder_layers=[draw(batch, 7, 16) for _ in range(2)])


MODELS = {
    "bria": Small(bria, tokens, "bria", STEPS, PROJECTIONS, COLUMNS),
    "bria_fibo": Small(fibo, fibo_inputs, "bria", STEPS, PROJECTIONS, COLUMNS),
}
