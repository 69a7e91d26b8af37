"""U-Nets of videos: AnimateDiff, Stable Video Diffusion, ModelScope, I2VGen-XL."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import LOG_SIGMA, STEPS, Draw, Small

SMALL: dict[str, Any] = dict(
    block_out_channels=(8,), layers_per_block=1, cross_attention_dim=16,
)  # fmt: skip


def kinds(name: str) -> dict[str, tuple[str, str]]:
    return dict(
        down_block_types=(f"CrossAttnDownBlock{name}",),
        up_block_types=(f"CrossAttnUpBlock{name}",),
    )


def motion() -> nn.Module:
    return diffusers.UNetMotionModel(
        **SMALL, **kinds("Motion"), norm_num_groups=4, num_attention_heads=2,
        motion_num_attention_heads=2,
    )  # fmt: skip


def spatio_temporal() -> nn.Module:
    return diffusers.UNetSpatioTemporalConditionModel(
        **SMALL | dict(block_out_channels=(32,)), **kinds("SpatioTemporal"), in_channels=4,
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        num_attention_heads=(2,), num_frames=2,
    )  # fmt: skip


def unet3d() -> nn.Module:
    return diffusers.UNet3DConditionModel(
        **SMALL, **kinds("3D"), norm_num_groups=4, attention_head_dim=4
    )


def i2vgen() -> nn.Module:
    return diffusers.I2VGenXLUNet(**SMALL, **kinds("3D"), norm_num_groups=4, attention_head_dim=4)


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        sample=draw(batch, 4, 2, 8, 8), timestep=7, encoder_hidden_states=draw(batch, 7, 16)
    )


def motion_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(encoder_hidden_states=draw(batch * 2, 7, 16))


def spatio_temporal_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        sample=draw(batch, 2, 4, 8, 8),
        timestep=torch.tensor(7.0),
        encoder_hidden_states=draw(batch, 1, 16),
        added_time_ids=torch.ones(batch, 3),
    )


def i2vgen_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(
        fps=torch.tensor([8] * batch),
        image_latents=draw(batch, 4, 2, 8, 8),
        image_embeddings=draw(batch, 16),
    )


SPATIAL = {r".*\.attentions\.\d\.transformer_blocks\.0\.attn[12]\.to_out\.0": 8}
OVER_FRAMES = {
    r".*\.temp_attentions\.\d\.transformer_blocks\.0\.attn[12]\.to_out\.0": 8,
    r"transformer_in\.transformer_blocks\.0\.attn[12]\.to_out\.0": 2,
}

MODELS = {
    "unet_motion": Small(
        motion, motion_inputs, "unet_motion", STEPS,
        SPATIAL
        | {r".*\.motion_modules\.\d\.transformer_blocks\.0\.attn[12]\.to_out\.0": 8},
        lean={"BasicTransformerBlock": 4},
    ),
    "unet_spatio_temporal": Small(
        spatio_temporal, spatio_temporal_inputs, "unet_spatio_temporal", LOG_SIGMA,
        SPATIAL
        | {r".*\.attentions\.\d\.temporal_transformer_blocks\.0\.attn[12]\.to_out\.0": 8},
        lean={"BasicTransformerBlock": 4},
    ),
    "unet_3d": Small(
        unet3d, inputs, "unet_3d", STEPS, SPATIAL | OVER_FRAMES, lean={"BasicTransformerBlock": 9}
    ),
    "i2vgen": Small(
        i2vgen, i2vgen_inputs, "unet_3d", STEPS,
        SPATIAL | OVER_FRAMES | {r"image_latents_temporal_encoder\.attn1\.to_out\.0": 1},
        lean={"BasicTransformerBlock": 9},
    ),
}  # fmt: skip
