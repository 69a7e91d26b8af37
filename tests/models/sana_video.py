"""SANA-Video: linear attention to itself, softmax attention to the text."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=16, rope_max_seq_len=16, sample_size=4,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


MODELS = {
    "sana_video": Small(
        make, inputs, "sana_video", STEPS, {r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2},
        other={r".*attn1.*": "linear attention"},
    ),
}  # fmt: skip
