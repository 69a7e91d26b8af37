"""PRX."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timestep=draw(batch).sigmoid(),
        encoder_hidden_states=draw(batch, 7, 16),
    )


MODELS = {"prx": Small(make, inputs, "prx", SHARE, {r"blocks\.[01]\.attention\.to_out\.0": 2})}
