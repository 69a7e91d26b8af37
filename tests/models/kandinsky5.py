"""Kandinsky 5: the text by itself, then the video, which reads it."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=8,
        model_dim=32, ff_dim=32, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 2, 4, 4, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=draw(batch).abs() * 300,
        pooled_projections=draw(batch, 8),
        visual_rope_pos=[torch.arange(2)] * 3,
        text_rope_pos=torch.arange(7),
    )


MODELS = {
    "kandinsky5": Small(
        make, inputs, "kandinsky5", STEPS,
        {
            r"text_transformer_blocks\.0\.self_attention\.out_layer": 1,
            r"visual_transformer_blocks\.0\.(self|cross)_attention\.out_layer": 2,
        },
    ),
}  # fmt: skip
