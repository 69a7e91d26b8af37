"""Sana."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=16, sample_size=8,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


MODELS = {
    "sana": Small(
        make, inputs, "sana", STEPS, {r"transformer_blocks\.[01]\.attn[12]\.to_out\.0": 4},
        other={r"transformer_blocks\.[01]\.attn1\.to_out\.0": "linear attention"},
    ),
}  # fmt: skip
