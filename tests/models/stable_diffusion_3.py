"""SD3, SD3.5 and their ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small

_CONFIG = dict(
    sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
    num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
    pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
)  # fmt: skip
_ONE_BLOCK = _CONFIG | dict(num_layers=1)


def sd3(**options: Any) -> nn.Module:
    return diffusers.SD3Transformer2DModel(**(_CONFIG | options))


def sd35() -> nn.Module:
    """With norms of queries and keys, and a second attention of the image in the first block."""
    return diffusers.SD3Transformer2DModel(
        **_CONFIG, qk_norm="rms_norm", dual_attention_layers=(0,)
    )


def controlnet() -> nn.Module:
    return diffusers.SD3ControlNetModel(**_ONE_BLOCK)


def controlnet_of_the_image() -> nn.Module:
    """As SD3.5-large's: blocks that know no text, on tokens."""
    config = _ONE_BLOCK | dict(joint_attention_dim=None, pos_embed_type=None)
    return diffusers.SD3ControlNetModel(**config, use_pos_embed=False)


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 16, 16),
        encoder_hidden_states=draw(batch, 7, 32),
        pooled_projections=draw(batch, 16),
        timestep=(draw(batch).abs() * 300).long(),
    )


def control_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(controlnet_cond=draw(batch, 4, 16, 16))


def image_control_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    found = control_inputs(draw, batch) | dict(hidden_states=draw(batch, 64, 32))
    del found["encoder_hidden_states"]
    return found


MODELS = {
    "sd3": Small(
        sd3, inputs, "sd3", STEPS,
        {
            r"transformer_blocks\.[01]\.attn\.to_out\.0": 2,
            r"transformer_blocks\.0\.attn\.to_add_out": 1,
        },
        lean={"JointTransformerBlock": 2},
    ),
    "sd35": Small(
        sd35, inputs, "sd3", STEPS,
        {
            r"transformer_blocks\.[01]\.attn\.to_out\.0": 2,
            r"transformer_blocks\.0\.attn\.to_add_out": 1,
            r"transformer_blocks\.0\.attn2\.to_out\.0": 1,
        },
        lean={"JointTransformerBlock": 2},
    ),
    "sd3_controlnet": Small(
        controlnet, control_inputs, "sd3", STEPS,
        {
            r"transformer_blocks\.0\.attn\.to_out\.0": 1,
            r"transformer_blocks\.0\.attn\.to_add_out": 1,
        },
        idle={r"transformer_blocks\.0\.attn\.to_add_out": "nothing reads the last block's text"},
        lean={"JointTransformerBlock": 1},
    ),
    "sd35_controlnet": Small(
        controlnet_of_the_image, image_control_inputs, "sd3", STEPS,
        {r"transformer_blocks\.0\.attn\.to_out\.0": 1},
    ),
}  # fmt: skip
