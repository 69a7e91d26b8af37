"""ControlNet: beside an adapted U-Net, whose residuals it gives, and adapted itself."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta

from .. import models
from ..models import stable_diffusion_3

CONFIG = a3fta.AdapterConfig(rank=4)


@pytest.fixture
def control() -> nn.Module:
    """Of sd15, with weights where new ones are zero."""
    torch.manual_seed(0)
    controlnet = diffusers.ControlNetModel.from_unet(
        models.build("sd15"), conditioning_embedding_out_channels=(4, 8)
    )
    for parameter in controlnet.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return controlnet.eval()


def residuals(controlnet: nn.Module) -> tuple[list[Tensor], Tensor]:
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return controlnet(**models.inputs("sd15"), controlnet_cond=picture, return_dict=False)


def run(unet: nn.Module, controlnet: nn.Module | None) -> Tensor:
    batch: dict[str, Any] = models.inputs("sd15")
    if controlnet is not None:
        down, middle = residuals(controlnet)
        batch |= dict(down_block_additional_residuals=down, mid_block_additional_residual=middle)
    return unet(**batch).sample


def test_beside_an_adapted_unet(control):
    unet, before = models.build("sd15"), models.snapshot(control)
    with torch.no_grad():
        stock = run(unet, control)
        assert not torch.allclose(run(unet, None), stock, rtol=1e-2, atol=1e-2)
        a3fta.inject(unet, CONFIG)
        torch.testing.assert_close(run(unet, control), stock)
        models.randomize(unet)
        assert not torch.allclose(run(unet, control), stock, rtol=1e-2, atol=1e-2)
        with a3fta.disabled(unet):
            torch.testing.assert_close(run(unet, control), stock)
    models.assert_unchanged(control, before)


def test_an_adapted_controlnet(control):
    unet, before = models.build("sd15").requires_grad_(False), models.snapshot(control)
    with torch.no_grad():
        stock = run(unet, control)
    report = a3fta.inject(control, CONFIG)
    assert report.families == {"unet_condition": 4}  # a block on the way down, one in the middle
    assert len(report.processors) == 4 and not report.left_processors
    y = run(unet, control)
    torch.testing.assert_close(y, stock)
    models.randomize(control, std=0.5)
    y = run(unet, control)
    assert not torch.allclose(y, stock, rtol=1e-2, atol=1e-2)
    y.square().mean().backward()
    for name, parameter in control.named_parameters():
        assert (parameter.grad is not None) == (".adapters." in name), name
    a3fta.eject(control)
    models.assert_unchanged(control, before)


def test_sd3_takes_the_residuals_of_its_own():
    """The first block's alone: the last is not controlled."""
    transformer = models.sd3().eval()
    controlnet = stable_diffusion_3.MODELS["sd3_controlnet"].build()
    batch = models.sd3_inputs()
    a3fta.inject(transformer, CONFIG)
    models.randomize(transformer)
    with torch.no_grad():
        picture = torch.randn(2, 4, 16, 16)
        (control,) = controlnet(**batch, controlnet_cond=picture, return_dict=False)
        found = transformer(**batch, block_controlnet_hidden_states=control).sample
        plain = transformer(**batch).sample
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)
