"""DiT."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=(draw(batch).abs() * 300).long(),
        class_labels=torch.arange(batch),
    )


MODELS = {
    "dit": Small(make, inputs, "dit", STEPS, {r"transformer_blocks\.\d\.attn1\.to_out\.0": 2})
}
