"""Chroma."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .flux1 import COLUMNS, PROJECTIONS, SIZES, tokens
from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.ChromaTransformer2DModel(
        **SIZES, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    """With the end of the text hidden, as its pipeline does."""
    mask = torch.ones(batch, 23, dtype=torch.bool)
    mask[:, 5:7] = False
    return tokens(draw, batch) | dict(attention_mask=mask)


MODELS = {
    "chroma": Small(
        make, inputs, "chroma", SHARE, PROJECTIONS, COLUMNS, forgets="the mask of single blocks"
    )
}
