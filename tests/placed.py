"""Small attention layers and models with adapters of each placement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import AdapterConfig

from . import models

LATE = ("post", "parallel")
late = pytest.mark.parametrize("placement", LATE)


class Net(nn.Module):
    """Attention from 16 channels to 24: what each placement reads and adds has its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(query_dim=16, heads=2, dim_head=4, out_dim=24)
        self.attention.to_out[0] = nn.Linear(24, 24)

    def forward(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.attention(sample)


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def net_with(*placements: str, backend: str = "reference", **options: Any) -> Net:
    model = net()
    for placement in placements:
        config = AdapterConfig(**{"rank": 3, "placement": placement, "scale": 0.7} | options)
        a3fta.inject(model, config, name=placement, backend=backend)
        models.randomize(model, placement, std=0.4)
    a3fta.set_adapters(model, list(placements), [0.5 + i for i in range(len(placements))])
    return model


def adapted(name: str, placement: str, **options: Any) -> nn.Module:
    model = models.sd3() if name == "sd3" else models.build(name)
    a3fta.inject(model, AdapterConfig(rank=4, placement=placement, **options))
    models.randomize(model, std=0.3)
    return model.train()
