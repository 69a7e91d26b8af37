"""Wan 2.1 (text to video; image to video, whose text layers read an image's tokens too), VACE,
SkyReels V2, ChronoEdit, Animate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small

SUM = {r"blocks\.0\.attn2\.to_out\.0": "attention to the text + attention to the image"}


def make(kind: str, **options: Any) -> Callable[[], nn.Module]:
    config = dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    return lambda: getattr(diffusers, kind)(**config | options)


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        encoder_hidden_states=draw(batch, 7, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


def image_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(encoder_hidden_states_image=draw(batch, 257, 8))


def vace_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(control_hidden_states=draw(batch, 6, 2, 4, 4))


def animate_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return image_inputs(draw, batch) | dict(
        hidden_states=draw(batch, 12, 2, 4, 4),
        pose_hidden_states=draw(batch, 4, 1, 4, 4),
        face_pixel_values=draw(batch, 3, 4, 8, 8),
    )


BLOCKS = {r"blocks\.0\.attn[12]\.to_out\.0": 2}
IMAGE = dict(image_dim=8, added_kv_proj_dim=24)
ANIMATE: dict[str, Any] = dict(
    in_channels=12, latent_channels=4, motion_encoder_size=8, motion_style_dim=8,
    motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_dim=4, motion_encoder_dim=8,
    face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1,
)  # fmt: skip

MODELS = {
    "wan": Small(make("WanTransformer3DModel"), inputs, "wan", STEPS, BLOCKS),
    "wan_i2v": Small(
        make("WanTransformer3DModel", **IMAGE), image_inputs, "wan", STEPS, BLOCKS, other=SUM
    ),
    "wan_vace": Small(
        make("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6), vace_inputs, "wan",
        STEPS, BLOCKS | {r"vace_blocks\.0\.attn[12]\.to_out\.0": 2},
    ),
    "skyreels_v2": Small(make("SkyReelsV2Transformer3DModel"), inputs, "wan", STEPS, BLOCKS),
    "chronoedit": Small(
        make("ChronoEditTransformer3DModel", **IMAGE), image_inputs, "wan", STEPS, BLOCKS, other=SUM
    ),
    "wan_animate": Small(
        make("WanAnimateTransformer3DModel", **IMAGE | ANIMATE), animate_inputs, "wan", STEPS,
        BLOCKS | {r"face_adapter\.0\.to_out": 1},
        other=SUM | {r"face_adapter\.0\.to_out": "each frame's attention, put side by side"},
    ),
}  # fmt: skip
