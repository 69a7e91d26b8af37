"""Stable Audio Open."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.StableAudioDiTModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, cross_attention_dim=16, cross_attention_input_dim=16,
        time_proj_dim=8, global_states_input_dim=8, sample_size=4,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 6),
        timestep=draw(1).abs(),
        encoder_hidden_states=draw(batch, 7, 16),
        global_hidden_states=draw(batch, 1, 8),
        rotary_embedding=get_1d_rotary_pos_embed(4, 7, use_real=True, repeat_interleave_real=False),
    )


MODELS = {
    "stable_audio": Small(
        make, inputs, "stable_audio", SHARE, {r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2}
    ),
}
