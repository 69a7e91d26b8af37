"""HunyuanDiT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    """4 layers: the last reads the first's output by a skip connection."""
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=32, num_layers=4, mlp_ratio=2.0, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=5, text_len_t5=4,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=draw(batch).abs() * 300,
        encoder_hidden_states=draw(batch, 5, 16),
        text_embedding_mask=torch.ones(batch, 5),
        encoder_hidden_states_t5=draw(batch, 4, 16),
        text_embedding_mask_t5=torch.ones(batch, 4),
        image_meta_size=torch.ones(batch, 6),
        style=torch.zeros(batch, dtype=torch.long),
        image_rotary_emb=[draw(16, 16).cos(), draw(16, 16).sin()],
    )


MODELS = {
    "hunyuan_dit": Small(
        make, inputs, "hunyuan_dit", STEPS, {r"blocks\.\d\.attn[12]\.to_out\.0": 8}
    ),
}
