"""Small real models, each with the ways to train it, for the tests of the ledger."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import a3fta_kernels as a3fta

from .. import models


def flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip


def flux_inputs(dtype: torch.dtype) -> dict[str, Any]:
    return dict(
        hidden_states=torch.randn(2, 16, 4, dtype=dtype),
        encoder_hidden_states=torch.randn(2, 7, 32, dtype=dtype),
        pooled_projections=torch.randn(2, 32, dtype=dtype),
        timestep=torch.tensor([0.5, 0.7], dtype=dtype),
        guidance=torch.tensor([3.5, 3.5], dtype=dtype),
        img_ids=torch.zeros(16, 3, dtype=dtype),
        txt_ids=torch.zeros(7, 3, dtype=dtype),
    )


NAMES = ("sd15", "sdxl", "unet2d", "sd3", "flux")
_ALL = ("full", "checkpointed", "reference", "native", "adapted, checkpointed", "lora", "both")
# no adapters for Flux's attention
WAYS = {name: ("full", "checkpointed", "lora") if name == "flux" else _ALL for name in NAMES}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model that trains in full, and what it takes."""
    if name == "flux":
        return flux().to(dtype).train(), flux_inputs(dtype)
    if name == "sd3":
        inputs = models.sd3_inputs()
        floats = {k: v.to(dtype) for k, v in inputs.items() if v.is_floating_point()}
        return models.sd3().to(dtype).train(), inputs | floats
    return models.build(name, dtype=dtype).train(), models.inputs(name, dtype=dtype)


def set_up(model: nn.Module, way: str) -> None:
    config = a3fta.AdapterConfig(rank=4)
    if way in ("lora", "both"):
        model.requires_grad_(False)
        lora = LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        inject_adapter_in_model(lora, model)
    if way == "both":
        a3fta.inject(model, config, backend="reference")
    if way in ("reference", "native"):
        a3fta.inject(model, config, backend=way)
    if way == "adapted, checkpointed":
        a3fta.inject(model, config, backend="reference")
    if "checkpointed" in way:
        model.enable_gradient_checkpointing()
