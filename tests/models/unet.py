"""U-Nets: SD1.5, SD2, SDXL, Kandinsky 2 and 3, unconditional."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from .small import STEPS, Draw, Small

_SMALL = dict(
    block_out_channels=(32, 64),
    layers_per_block=1,
    norm_num_groups=8,
    sample_size=16,
    in_channels=4,
    out_channels=4,
)
_CROSS = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
)


def sd15(**options: Any) -> nn.Module:
    """Like SD1.5: convolutions around the transformer, 4 heads."""
    config = {**_SMALL, **_CROSS, "attention_head_dim": 4} | options
    return diffusers.UNet2DConditionModel(**config)


def sd2(**options: Any) -> nn.Module:
    """Like SD2: linear projections around the transformer, heads per level, upcast attention."""
    options = {
        "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True
    } | options  # fmt: skip
    return sd15(**options)


def sdxl(**options: Any) -> nn.Module:
    """Like SDXL: more transformer layers at depth, and the size and text embeddings."""
    options = {
        "attention_head_dim": (2, 4), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    } | options  # fmt: skip
    return sd15(**options)


def kandinsky(**options: Any) -> nn.Module:
    """Like Kandinsky 2: keys and values of the text are added to those of the image."""
    options = {
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "attention_head_dim": 8,
    } | options  # fmt: skip
    return sd15(**options)


def unet2d(**options: Any) -> nn.Module:
    """UNet2DModel: attention on 4-D input with its own group norm and residual."""
    config = _SMALL | dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return diffusers.UNet2DModel(**(config | options))


def kandinsky3() -> nn.Module:
    """Attention between convolutions, without a transformer around; one more pools the text."""
    return diffusers.Kandinsky3UNet(
        time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2,
        block_out_channels=(16, 16), cross_attention_dim=16, encoder_hid_dim=16,
    )  # fmt: skip


def controlnet() -> nn.Module:
    return diffusers.ControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, in_channels=4,
        down_block_types=_CROSS["down_block_types"], cross_attention_dim=32, attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 8),
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(sample=draw(batch, 4, 16, 16), timestep=7, encoder_hidden_states=draw(batch, 7, 32))


def sdxl_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(
        added_cond_kwargs=dict(text_embeds=draw(batch, 32), time_ids=draw(batch, 6) * 0 + 1)
    )


def control_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(controlnet_cond=draw(batch, 3, 32, 32))


def unet2d_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(sample=draw(batch, 4, 16, 16), timestep=7)


def kandinsky3_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        sample=draw(batch, 4, 8, 8),
        timestep=7,
        encoder_hidden_states=draw(batch, 7, 16),
        encoder_attention_mask=torch.ones(batch, 7),
    )


def _blocks(at_depth: int) -> dict[str, int]:
    """Projections of a U-Net of `_CROSS`, with that many transformer layers in a block."""
    where = r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\.\d\.transformer_blocks\.\d"
    return {where + rf"\.attn{i}\.to_out\.0": 4 * at_depth for i in (1, 2)}


MODELS = {
    "sd15": Small(
        sd15, inputs, "unet_condition", STEPS, _blocks(1), lean={"BasicTransformerBlock": 4}
    ),
    "sd2": Small(
        sd2, inputs, "unet_condition", STEPS, _blocks(1), lean={"BasicTransformerBlock": 4}
    ),
    "sdxl": Small(
        sdxl, sdxl_inputs, "unet_condition", STEPS, _blocks(2), lean={"BasicTransformerBlock": 8}
    ),
    "kandinsky": Small(
        kandinsky, inputs, "unet_condition", STEPS,
        {r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\.\d\.to_out\.0": 4},
    ),
    "kandinsky3": Small(
        kandinsky3, kandinsky3_inputs, "unet_condition", STEPS,
        {
            r"(down|up)_blocks\.\d\.attentions\.\d\.attention\.to_out\.0": 9,
            r"add_time_condition\.attention\.to_out\.0": 1,
        },
    ),
    "controlnet": Small(
        controlnet, control_inputs, "unet_condition", STEPS,
        {rf"(down_blocks\.1|mid_block)\.attentions.+\.attn{i}\.to_out\.0": 2 for i in (1, 2)},
        lean={"BasicTransformerBlock": 2},
    ),
    "unet2d": Small(
        unet2d, unet2d_inputs, "unet", STEPS,
        {r"(down_blocks\.1|mid_block|up_blocks\.0)\.attentions\.\d\.to_out\.0": 4},
    ),
}  # fmt: skip
