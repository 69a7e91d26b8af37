"""Qwen-Image, and the edit variant: more images than one, of which the last are given."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import SHARE, Draw, Small

_CONFIG = dict(
    in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
)  # fmt: skip
_PROJECTIONS = {
    r"transformer_blocks\.[01]\.attn\.to_out\.0": 2,
    r"transformer_blocks\.[01]\.attn\.to_add_out": 2,
}
_IDLE = {r"transformer_blocks\.1\.attn\.to_add_out": "nothing reads the last block's text"}


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(**_CONFIG)


def edit() -> nn.Module:
    """As Qwen-Image-Edit-2511: tokens of given images are modulated as at time 0."""
    return diffusers.QwenImageTransformer2DModel(**_CONFIG, zero_cond_t=True)


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    """With the end of the text hidden."""
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[:, 5:] = False
    return dict(
        hidden_states=draw(batch, 16, 16),
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_hidden_states_mask=mask,
        timestep=draw(batch).sigmoid(),
        img_shapes=[[(1, 4, 4)]] * batch,
    )


def edit_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(
        hidden_states=draw(batch, 32, 16), img_shapes=[[(1, 4, 4), (1, 4, 4)]] * batch
    )


MODELS = {
    "qwen": Small(qwen, inputs, "qwen", SHARE, _PROJECTIONS, idle=_IDLE),
    "qwen_edit": Small(edit, edit_inputs, "qwen", SHARE, _PROJECTIONS, idle=_IDLE),
}
