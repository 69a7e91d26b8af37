"""OmniGen."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import SHARE_LEFT, Draw, Small


def make() -> nn.Module:
    return diffusers.OmniGenTransformer2DModel(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=64,
        num_layers=2, pad_token_id=0, vocab_size=50, max_position_embeddings=64,
        original_max_position_embeddings=64, pos_embed_max_size=8, time_step_dim=16,
        rope_scaling=dict(short_factor=[1.0] * 4, long_factor=[1.0] * 4),
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    """7 tokens of text, the time and 16 of the image; each attends to all."""
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=draw(batch).sigmoid(),
        input_ids=(draw(batch, 7).abs() * 10).long(),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(batch, 24, 24),
        position_ids=torch.arange(24).expand(batch, 24),
    )


MODELS = {
    "omnigen": Small(
        make, inputs, "omnigen", SHARE_LEFT, {r"layers\.[01]\.self_attn\.to_out\.0": 2},
        reads_numbers="the last position, to choose rotary factors",
    ),
}  # fmt: skip
