"""Lumina-Next and Lumina 2."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import nn

from .small import SHARE_LEFT, Draw, Small


def lumina_next() -> nn.Module:
    model = diffusers.LuminaNextDiT2DModel(
        sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2,
        multiple_of=16, cross_attention_dim=16,
    )  # fmt: skip
    nn.init.zeros_(model.pad_token)  # made without numbers, and not used
    return model


def next_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=draw(batch).sigmoid(),
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_mask=torch.ones(batch, 7),
        image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 16, 16),
        cross_attention_kwargs={},
    )


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8),
        axes_lens=(32, 8, 8), cap_feat_dim=16,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=draw(batch).sigmoid(),
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7, dtype=torch.bool),
    )


MODELS = {
    "lumina_next": Small(
        lumina_next, next_inputs, "lumina", SHARE_LEFT, {r"layers\.[01]\.attn2\.to_out\.0": 2},
        other={r"layers\.[01]\.attn2\.to_out\.0": "self-attention + tanh(gate) cross-attention"},
    ),
    "lumina2": Small(
        lumina2, inputs, "lumina", SHARE_LEFT,
        {r"(noise_refiner|context_refiner|layers)\.0\.attn\.to_out\.0": 3},
        reads_numbers="the lengths of texts, from their mask",
    ),
}  # fmt: skip
