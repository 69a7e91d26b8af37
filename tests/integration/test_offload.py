"""Offloaded models: weights that are elsewhere, and on the meta device, between forwards."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import nn

import a3fta_kernels as a3fta

from .common import BACKENDS, adapted_unet, forward, inputs, randomize, set_backend, stock_unet

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="diffusers' model offload needs an accelerator"
)


def expected_output() -> torch.Tensor:
    model = adapted_unet()
    set_backend(model, "reference")
    return forward(model, inputs(model))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["state dict", "disk"])
def test_sequential_offload_after_injection(kind: str, backend: str, tmp_path):
    model = adapted_unet()
    set_backend(model, backend)
    batch = inputs(model)
    if kind == "disk":
        disk_offload(model, tmp_path, execution_device="cpu", offload_buffers=True)
    else:
        cpu_offload(model, execution_device="cpu", offload_buffers=True)
    layers = a3fta.projections(model)
    for _ in range(2):
        assert all(layer.weight.device.type == "meta" for layer in layers.values())
        found = forward(model, batch)
        torch.testing.assert_close(found, expected_output(), rtol=1e-4, atol=1e-5)
    assert all(layer.weight.device.type == "meta" for layer in layers.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_injection_into_an_offloaded_model(backend: str):
    model = stock_unet()
    batch = inputs(model)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4), backend=backend)
    randomize(model)
    assert all(p.device.type == "cpu" for p in a3fta.trainable_parameters(model))
    torch.testing.assert_close(forward(model, batch), expected_output(), rtol=1e-4, atol=1e-5)


def test_load_into_an_offloaded_model_and_eject(tmp_path):
    a3fta.save_adapter(adapted_unet(), tmp_path)
    model = stock_unet()
    batch = inputs(model)
    stock = forward(model, batch)
    cpu_offload(model, execution_device="cpu", offload_buffers=True)
    a3fta.load_adapter(model, tmp_path, backend="reference")
    torch.testing.assert_close(forward(model, batch), expected_output(), rtol=1e-4, atol=1e-5)
    a3fta.eject(model)
    assert torch.equal(forward(model, batch), stock)
    remove_hook_from_module(model, recurse=True)


def test_adapters_train_beside_offloaded_weights():
    """The trunk's weights are on meta before and after each layer's forward."""
    model = adapted_unet()
    projection = next(iter(a3fta.projections(model).values()))
    adapter = projection.adapters["default"]
    h = torch.randn(2, 6, projection.in_features)
    projection(h).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    model.zero_grad(set_to_none=True)

    weights = {"weight": projection.weight.detach(), "bias": projection.bias.detach()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=False)
    add_hook_to_module(projection, hook)
    assert projection.weight.device.type == "meta" and adapter.w_up.device.type == "cpu"
    projection(h).square().sum().backward()
    assert projection.weight.device.type == "meta"
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def pipeline(unet: nn.Module) -> StableDiffusionPipeline:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2,
                        down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    return StableDiffusionPipeline(
        vae, None, None, unet, DDIMScheduler(), None, None, requires_safety_checker=False
    )


@needs_cuda
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_pipeline_offload(kind: str):
    """The real thing: adapters follow their model to the device and back."""
    unet = adapted_unet()
    pipe = pipeline(unet)
    options = dict(
        prompt_embeds=torch.randn(1, 5, 16), guidance_scale=1.0, num_inference_steps=2,
        latents=torch.randn(1, 4, 8, 8), output_type="latent", height=16, width=16,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(**options).images
    offload = getattr(pipe, f"enable_{kind}_cpu_offload")
    offload()
    found = pipe(**options).images
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-2, atol=1e-2)
    assert all(p.device.type in ("cpu", "meta") for p in unet.parameters())
