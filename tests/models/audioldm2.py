"""AudioLDM 2: beside attention to itself, attention to two texts, each by a transformer."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=((None, 16, 8),),
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        sample=draw(batch, 4, 8, 8),
        timestep=7,
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_hidden_states_1=draw(batch, 5, 8),
    )


MODELS = {
    "audioldm2": Small(
        make, inputs, "audioldm2", STEPS,
        {r".*attentions\.\d\.transformer_blocks\.0\.attn[12]\.to_out\.0": 24},
        lean={"BasicTransformerBlock": 12},
    ),
}  # fmt: skip
