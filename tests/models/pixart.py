"""PixArt, alpha and sigma."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=16,
        norm_num_groups=8, use_additional_conditions=False,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )


MODELS = {
    "pixart": Small(
        make, inputs, "pixart", STEPS, {r"transformer_blocks\.\d\.attn[12]\.to_out\.0": 4}
    ),
}  # fmt: skip
