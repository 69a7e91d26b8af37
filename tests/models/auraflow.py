"""AuraFlow."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=draw(batch).sigmoid(),
    )


MODELS = {
    "auraflow": Small(
        make, inputs, "auraflow", SHARE,
        {
            r"joint_transformer_blocks\.0\.attn\.to_out\.0": 1,
            r"joint_transformer_blocks\.0\.attn\.to_add_out": 1,
            r"single_transformer_blocks\.0\.attn\.to_out\.0": 1,
        },
        lean=None,
    ),
}  # fmt: skip
