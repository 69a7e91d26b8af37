"""CogVideoX: text and video as one sequence."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=5, max_text_seq_length=7, use_rotary_positional_embeddings=False,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 2, 4, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


MODELS = {
    "cogvideox": Small(
        make, inputs, "cogvideox", STEPS, {r"transformer_blocks\.0\.attn1\.to_out\.0": 1}
    ),
}
