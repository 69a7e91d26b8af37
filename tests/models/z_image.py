"""Z-Image."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import SHARE_LEFT, Draw, Small


def make() -> nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[128, 8, 8],
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        x=[draw(4, 1, 8, 8) for _ in range(batch)],
        t=draw(batch).sigmoid(),
        cap_feats=[draw(7, 16) for _ in range(batch)],
    )


MODELS = {
    "z_image": Small(
        make, inputs, "z_image", SHARE_LEFT,
        {r"(noise_refiner|context_refiner|layers)\.0\.attention\.to_out\.0": 3},
        lean={"ZImageTransformerBlock": 3},
    ),
}  # fmt: skip
