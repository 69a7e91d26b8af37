"""Small real models, each with the ways to train it, for the tests of the ledger."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import a3fta_kernels as a3fta

from .. import models

NAMES = ("sd15", "sdxl", "unet2d", "sd3", "flux")
WAYS = ("full", "checkpointed", "reference", "native", "adapted, checkpointed", "lora", "both")


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A model that trains in full, and what it takes."""
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
