"""Mochi: text and video attend together, without the text's padding."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS_LEFT, Draw, Small


def make() -> nn.Module:
    return diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=7,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
        encoder_attention_mask=torch.ones(batch, 7).bool(),
    )


MODELS = {
    "mochi": Small(
        make, inputs, "mochi", STEPS_LEFT,
        {
            r"transformer_blocks\.[01]\.attn1\.to_out\.0": 2,
            r"transformer_blocks\.0\.attn1\.to_add_out": 1,
        },
        takes_sizes="the text's lengths",
        other={".*": "each sample's attention, put side by side"},
    ),
}  # fmt: skip
