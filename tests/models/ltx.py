"""LTX-Video; LTX-2, whose video and audio read each other, with and without gates."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, num_layers=1, caption_channels=16,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 8, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
        encoder_attention_mask=torch.ones(batch, 7).bool(),
        num_frames=2,
        height=2,
        width=2,
    )


def make2(**options: Any) -> nn.Module:
    config = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=1, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    return diffusers.LTX2VideoTransformer3DModel(**config | options)


def gated() -> nn.Module:
    return make2(gated_attn=True, audio_gated_attn=True)


def inputs2(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 8, 4),
        audio_hidden_states=draw(batch, 5, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        audio_encoder_hidden_states=draw(batch, 7, 16),
        timestep=draw(batch).abs() * 300,
        num_frames=2,
        height=2,
        width=2,
        fps=25.0,
        audio_num_frames=5,
    )


LTX2 = {
    r"transformer_blocks\.0\.(audio_)?attn[12]\.to_out\.0": 4,
    r"transformer_blocks\.0\.(audio_to_video|video_to_audio)_attn\.to_out\.0": 2,
}

MODELS = {
    "ltx": Small(make, inputs, "ltx", STEPS, {r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2}),
    "ltx2": Small(make2, inputs2, "ltx2", STEPS, LTX2),
    "ltx2_gated": Small(
        gated, inputs2, "ltx2", STEPS, LTX2, other={".*": "attention * 2 sigmoid(gate), per head"}
    ),
}  # fmt: skip
