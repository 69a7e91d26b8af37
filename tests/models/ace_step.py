"""ACE-Step 1.5."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import SHARE, Draw, Small


def make() -> nn.Module:
    return diffusers.AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, in_channels=12, audio_acoustic_hidden_dim=4,
        sliding_window=3,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 12, 4),
        timestep=draw(batch).sigmoid(),
        timestep_r=draw(batch).sigmoid(),
        encoder_hidden_states=draw(batch, 7, 32),
        context_latents=draw(batch, 12, 8),
    )


MODELS = {
    "ace_step": Small(
        make,
        inputs,
        "ace_step",
        SHARE,
        {r"layers\.[01]\.(self|cross)_attn\.to_out\.0": 4},
    ),
}
