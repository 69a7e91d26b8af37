"""Flux2."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .flux1 import SIZES, tokens
from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.Flux2Transformer2DModel(
        **SIZES, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=16, mlp_ratio=2.0
    )


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return tokens(draw, batch) | dict(
        img_ids=draw(16, 4), txt_ids=draw(7, 4) * 0, guidance=draw(batch) * 0 + 3.5
    )


MODELS = {
    "flux2": Small(
        make, inputs, "flux2", SHARE,
        {
            r"transformer_blocks\.0\.attn\.to_out\.0": 1,
            r"transformer_blocks\.0\.attn\.to_add_out": 1,
            r"single_transformer_blocks\.0\.attn\.to_out": 1,
        },
        columns={r"single_transformer_blocks\.0\.attn\.to_out": (0, 32)},
    ),
}  # fmt: skip
