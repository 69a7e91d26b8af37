"""EasyAnimate: the text has projections of its own in the first blocks alone."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2,
        sample_width=4, sample_height=4, num_layers=2, mmdit_layers=1, time_embed_dim=8,
        text_embed_dim=16,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        timestep=(draw(batch).abs() * 300).long(),
        encoder_hidden_states=draw(batch, 7, 16),
    )


MODELS = {
    "easyanimate": Small(
        make, inputs, "easyanimate", STEPS,
        {
            r"transformer_blocks\.[01]\.attn1\.to_out\.0": 2,
            r"transformer_blocks\.0\.attn1\.to_add_out": 1,
        },
    ),
}  # fmt: skip
