"""HiDream."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from .small import STEPS, Draw, Small


def make() -> nn.Module:
    """In training mode the experts are as in use: `force_inference_output`."""
    return diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[16, 16], text_emb_dim=16, num_routed_experts=2,
        num_activated_experts=1, axes_dims_rope=(4, 2, 2), max_resolution=(8, 8),
        llama_layers=[0, 1], force_inference_output=True,
    )  # fmt: skip


def inputs(draw: Draw, batch: int) -> dict[str, Any]:
    return dict(
        hidden_states=draw(batch, 4, 8, 8),
        timesteps=(draw(batch).abs() * 300).long(),
        encoder_hidden_states_t5=draw(batch, 5, 16),
        encoder_hidden_states_llama3=draw(2, batch, 5, 16),
        pooled_embeds=draw(batch, 16),
    )


MODELS = {
    "hidream": Small(
        make, inputs, "hidream", STEPS,
        {
            r"double_stream_blocks\.0\.block\.attn1\.to_out": 1,
            r"double_stream_blocks\.0\.block\.attn1\.to_out_t": 1,
            r"single_stream_blocks\.0\.block\.attn1\.to_out": 1,
        },
        reads_numbers="how many tokens each expert gets",
    ),
}  # fmt: skip
