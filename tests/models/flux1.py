"""Flux and its kin; what models of dual and single blocks have in common."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import SHARE, Draw, Small

SIZES = dict(
    patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
    num_attention_heads=2, joint_attention_dim=32,
)  # fmt: skip
PROJECTIONS = {
    r"transformer_blocks\.0\.attn\.to_out\.0": 1,
    r"transformer_blocks\.0\.attn\.to_add_out": 1,
    r"single_transformer_blocks\.0\.proj_out": 1,
}
COLUMNS = {r"single_transformer_blocks\.0\.proj_out": (0, 32)}
LEAN = {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1}


def flux(**options: Any) -> nn.Module:
    config = dict(pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    return diffusers.FluxTransformer2DModel(**(SIZES | config | options))


def fill() -> nn.Module:
    """Flux Fill: the masked image and the mask are further channels of the input."""
    return flux(in_channels=9, out_channels=4)


def controlnet() -> nn.Module:
    config = dict(pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True)
    return diffusers.FluxControlNetModel(**(SIZES | config))


def tokens(draw: Draw, batch: int) -> dict[str, Any]:
    """16 tokens of an image and 7 of a text, and where they are."""
    return dict(
        hidden_states=draw(batch, 16, 4),
        encoder_hidden_states=draw(batch, 7, 32),
        timestep=draw(batch).sigmoid(),
        img_ids=draw(16, 3),
        txt_ids=draw(7, 3) * 0,
    )


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return tokens(draw, batch) | dict(
        pooled_projections=draw(batch, 32), guidance=draw(batch) * 0 + 3.5
    )


def kontext_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    """Flux Kontext: the tokens of the image to edit follow those of the image to make."""
    return inputs(draw, batch) | dict(hidden_states=draw(batch, 32, 4), img_ids=draw(32, 3))


def fill_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(hidden_states=draw(batch, 16, 9))


def control_inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return inputs(draw, batch) | dict(controlnet_cond=draw(batch, 16, 4))


MODELS = {
    "flux": Small(flux, inputs, "flux", SHARE, PROJECTIONS, COLUMNS, lean=LEAN),
    "flux_kontext": Small(flux, kontext_inputs, "flux", SHARE, PROJECTIONS, COLUMNS, lean=LEAN),
    "flux_fill": Small(fill, fill_inputs, "flux", SHARE, PROJECTIONS, COLUMNS, lean=LEAN),
    "flux_controlnet": Small(
        controlnet, control_inputs, "flux", SHARE, PROJECTIONS, COLUMNS, lean=LEAN
    ),
}
