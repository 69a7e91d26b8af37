"""HunyuanVideo, its FramePack and image-to-video kinds; HunyuanVideo 1.5; HunyuanImage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small

HEADS, DIM = 2, 8
REFINER = {r"context_embedder\.token_refiner\.refiner_blocks\.0\.attn\.to_out\.0": 1}
DUAL = {r"transformer_blocks\.0\.attn\.(to_out\.0|to_add_out)": 2}
SINGLE = {r"single_transformer_blocks\.0\.proj_out": 1}
COLUMNS = {r"single_transformer_blocks\.0\.proj_out": (0, HEADS * DIM)}


def make(kind: str, **options: Any) -> Callable[[], nn.Module]:
    config = dict(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=DIM,
        num_layers=1, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16,
    )  # fmt: skip
    return lambda: getattr(diffusers, kind)(**config | options)


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        timestep=(draw(batch).abs() * 300).long(),
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7).long(),
        pooled_projections=draw(batch, 8),
        guidance=draw(batch).abs() * 1000,
    )


def framepack_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    found = inputs(draw, batch)
    return found | dict(
        image_embeds=draw(batch, 3, 8),
        indices_latents=torch.arange(2),
        latents_clean=draw(batch, 4, 1, 4, 4),
        indices_latents_clean=torch.arange(1),
        latents_history_2x=draw(batch, 4, 2, 4, 4),
        indices_latents_history_2x=torch.arange(2),
        latents_history_4x=draw(batch, 4, 4, 4, 4),
        indices_latents_history_4x=torch.arange(4),
    )


def inputs15(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        timestep=draw(batch).abs() * 300,
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7).long(),
        encoder_hidden_states_2=draw(batch, 3, 8),
        encoder_attention_mask_2=torch.ones(batch, 3).long(),
        image_embeds=draw(batch, 2, 8),
    )


def image_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 4, 4),
        timestep=draw(batch).abs() * 300,
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7).long(),
    )


VIDEO: dict[str, Any] = dict(
    num_single_layers=1, patch_size=2, patch_size_t=1, pooled_projection_dim=8,
    rope_axes_dim=(4, 2, 2),
)  # fmt: skip
FRAMEPACK = dict(has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True)
KIND = "HunyuanVideoTransformer3DModel"

MODELS = {
    "hunyuan_video": Small(
        make(KIND, **VIDEO), inputs, "hunyuan_video", STEPS, REFINER | DUAL | SINGLE, COLUMNS
    ),
    "hunyuan_video_i2v": Small(
        make(KIND, **VIDEO, image_condition_type="token_replace"), inputs, "hunyuan_video", STEPS,
        REFINER | DUAL | SINGLE, COLUMNS,
    ),
    "hunyuan_video_framepack": Small(
        make("HunyuanVideoFramepackTransformer3DModel", **VIDEO, **FRAMEPACK), framepack_inputs,
        "hunyuan_video", STEPS, REFINER | DUAL | SINGLE, COLUMNS, takes_sizes="the text's lengths",
    ),
    "hunyuan_video15": Small(
        make("HunyuanVideo15Transformer3DModel", num_layers=2, text_embed_2_dim=8,
             image_embed_dim=8, rope_axes_dim=(4, 2, 2)),
        inputs15, "hunyuan_video15", STEPS,
        REFINER | {r"transformer_blocks\.[01]\.attn\.(to_out\.0|to_add_out)": 4},
        idle={r"transformer_blocks\.1\.attn\.to_add_out": "nothing reads the last block's text"},
        reads_numbers="whether the image is all zero",
    ),
    "hunyuan_image": Small(
        make("HunyuanImageTransformer2DModel", num_single_layers=1, patch_size=(1, 1),
             rope_axes_dim=(4, 4)),
        image_inputs, "hunyuan_image", STEPS, REFINER | DUAL | SINGLE, COLUMNS,
        refuses="it hands its blocks keyword arguments, which checkpointing does not take",
    ),
}  # fmt: skip
