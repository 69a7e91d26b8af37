"""Allegro."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_height=4, sample_width=4, sample_frames=2,
        caption_channels=16,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    *freqs, t, h, w = get_3d_rotary_pos_embed_allegro(12, ((0, 0), (2, 2)), (2, 2), 2)
    grid = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1)
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
        attention_mask=torch.ones(batch, 2, 4, 4),
        encoder_attention_mask=torch.ones(batch, 1, 7),
        image_rotary_emb=(tuple(freqs), tuple(grid)),
    )


MODELS = {
    "allegro": Small(
        make, inputs, "allegro", STEPS, {r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2}
    ),
}
