"""CogView3-Plus and CogView4."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small

_CONFIG = dict(
    in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    text_embed_dim=16, time_embed_dim=16, condition_dim=4, pos_embed_max_size=8, sample_size=8,
)  # fmt: skip
_PROJECTIONS = {r"transformer_blocks\.[01]\.attn1\.to_out\.0": 2}


def cogview3plus() -> nn.Module:
    return diffusers.CogView3PlusTransformer2DModel(**_CONFIG)


def cogview4() -> nn.Module:
    return diffusers.CogView4Transformer2DModel(**_CONFIG, rope_axes_dim=(8, 8))


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    size = torch.full((batch, 2), 8.0)
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
        original_size=size,
        target_size=size,
        crop_coords=size * 0,
    )


MODELS = {
    "cogview3plus": Small(cogview3plus, inputs, "cogview", STEPS, _PROJECTIONS),
    "cogview4": Small(cogview4, inputs, "cogview", STEPS, _PROJECTIONS),
}
