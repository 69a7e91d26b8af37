"""Cosmos."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import LOG_SIGMA, Draw, Small

LAYERS = {r"transformer_blocks\.0\.attn[12]\.to_out\.0": 2}


def make(**options: Any) -> nn.Module:
    config = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 8, 8),
        concat_padding_mask=False,  # it takes torchvision
    )  # fmt: skip
    return diffusers.CosmosTransformer3DModel(**config | options)


def with_image() -> nn.Module:
    return make(img_context_dim_in=8, img_context_dim_out=32, img_context_num_tokens=3,
                text_embed_dim=32)  # fmt: skip


def inputs(draw: Draw, batch: int, width: int = 16) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 2, 4, 4),
        timestep=draw(batch).abs() * 300,
        encoder_hidden_states=draw(batch, 7, width),
        fps=16,
    )


def image_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    found = inputs(draw, batch, width=32)
    text = found.pop("encoder_hidden_states")
    return found | dict(encoder_hidden_states=(text, draw(batch, 3, 8)))


MODELS = {
    "cosmos": Small(make, inputs, "cosmos", LOG_SIGMA, LAYERS),
    "cosmos_image": Small(
        with_image, image_inputs, "cosmos", LOG_SIGMA, LAYERS,
        other={r".*attn2.*": "attention to the text + attention to the image"},
    ),
}  # fmt: skip
