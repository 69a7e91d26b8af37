"""A small adapted U-Net with adapters that are not zero, and what the themes ask of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.backends import why_not

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# every backend on every device where it runs; the values of a test's `backend` and `device`
RUNS = pytest.mark.parametrize(
    ("backend", "device"),
    [
        pytest.param(backend, torch.device(device), id=f"{backend}-{device}")
        for device in DEVICES
        for backend in ("reference", "native", "triton")
        if why_not(backend, torch.device(device), torch.float32) is None
    ],
)

Batch = dict[str, Tensor]


def stock_unet(device: torch.device | str = "cpu", seed: int = 0) -> UNet2DConditionModel:
    """Random weights; self- and cross-attention in the down, mid and up blocks."""
    torch.manual_seed(seed)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return model.to(device)


def adapted_unet(device: torch.device | str = "cpu", seed: int = 0, **options: Any) -> nn.Module:
    """`stock_unet` with adapters of random weights; options go to AdapterConfig."""
    model = stock_unet(device, seed)
    a3fta.inject(model, a3fta.AdapterConfig(**{"rank": 4, **options}))
    randomize(model)
    return model


def randomize(model: nn.Module, seed: int = 1, std: float = 0.2) -> None:
    """Draws every adapter parameter anew, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for projection in a3fta.projections(model).values():
            for parameter in projection.adapters.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def inputs(model: nn.Module, batch: int = 2, seed: int = 2) -> Batch:
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        "sample": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, 16, generator=generator),
    }
    return {
        key: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
        for key, value in drawn.items()
    }


def forward(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(**batch).sample


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the batch of something that every output element enters."""
    return model(**batch).sample.float().square().mean()


def adapter_grads(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients of all adapter parameters, by name; None fails."""
    found = {}
    for layer, projection in a3fta.projections(model).items():
        for name, parameter in projection.adapters.named_parameters():
            assert parameter.grad is not None, f"{layer}.{name} has no gradient"
            found[f"{layer}.{name}"] = parameter.grad.detach().clone()
    return found


def set_backend(model: nn.Module, backend: str) -> None:
    for projection in a3fta.projections(model).values():
        projection.backend = backend
