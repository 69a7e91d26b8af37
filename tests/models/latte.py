"""Latte: 3 frames of 16 tokens."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.LatteTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=32, sample_size=8, patch_size=2, caption_channels=16, video_length=3,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, attention_bias=True,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 3, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


MODELS = {
    "latte": Small(
        make, inputs, "latte", STEPS,
        {
            r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2,
            r"temporal_transformer_blocks\.0\.attn1\.to_out\.0": 1,
        },
    ),
}  # fmt: skip
