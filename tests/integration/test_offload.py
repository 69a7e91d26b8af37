"""Offloaded models: weights that are elsewhere, and on the meta device, between forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import nn

import a3fta_kernels as a3fta

from .common import (
    RUNS,
    adapted_unet,
    adapter_grads,
    forward,
    inputs,
    loss,
    randomize,
    set_backend,
    stock_unet,
)

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="accelerate's sequential offload of a pipeline needs a GPU",
)


def expected_output() -> torch.Tensor:
    model = adapted_unet()
    set_backend(model, "reference")
    return forward(model, inputs(model))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """What another device's float32 leaves, far below what the adapters do."""
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@RUNS
@pytest.mark.parametrize("kind", ["state dict", "disk"])
def test_sequential_offload_after_injection(
    kind: str, backend: str, device: torch.device, tmp_path: Path
):
    model = adapted_unet()
    set_backend(model, backend)
    batch = inputs(model)
    if kind == "disk":
        disk_offload(model, tmp_path, execution_device=device, offload_buffers=True)
    else:
        cpu_offload(model, execution_device=device, offload_buffers=True)
    layers = a3fta.projections(model)
    for _ in range(2):
        assert all(layer.weight.device.type == "meta" for layer in layers.values())
        found = forward(model, batch)
        assert_close(found, expected_output())
    assert all(layer.weight.device.type == "meta" for layer in layers.values())


@RUNS
def test_injection_into_an_offloaded_model(backend: str, device: torch.device):
    model = stock_unet()
    batch = inputs(model)
    cpu_offload(model, execution_device=device, offload_buffers=True)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4), backend=backend)
    randomize(model)
    assert all(p.device.type == device.type for p in a3fta.trainable_parameters(model))
    assert_close(forward(model, batch), expected_output())


def test_load_into_an_offloaded_model_and_eject(device: torch.device, tmp_path: Path):
    a3fta.save_adapter(adapted_unet(), tmp_path)
    model = stock_unet()
    batch = inputs(model)
    stock = forward(model, batch)
    cpu_offload(model, execution_device=device, offload_buffers=True)
    a3fta.load_adapter(model, tmp_path, backend="reference")
    assert_close(forward(model, batch), expected_output())
    a3fta.eject(model)
    assert_close(forward(model, batch), stock)
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
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    embeds = torch.randn(1, 5, 16, generator=generator)
    return pipe(
        prompt_embeds=embeds, latents=latents, height=16, width=16, guidance_scale=1.0,
        num_inference_steps=2, output_type="latent",
    ).images.cpu()  # fmt: skip


@pytest.mark.parametrize("when", ["inject first", "offload first"])
def test_pipeline_model_offload(when: str, device: torch.device):
    """Adapters follow their model to the device and back."""
    expected = sample(pipeline(adapted_unet()))
    stock = sample(pipeline(stock_unet()))
    pipe = pipeline(adapted_unet() if when == "inject first" else stock_unet())
    pipe.enable_model_cpu_offload(device=device.type)
    if when == "offload first":
        a3fta.inject(pipe, a3fta.AdapterConfig(rank=4))
        randomize(pipe.unet)
    for _ in range(2):
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-2, atol=1e-2)
        assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}
    assert (expected - stock).abs().max() > 0.05


@needs_cuda
def test_pipeline_sequential_offload():
    expected = sample(pipeline(adapted_unet()))
    pipe = pipeline(adapted_unet())
    pipe.enable_sequential_cpu_offload()
    for _ in range(2):
        torch.testing.assert_close(sample(pipe), expected, rtol=1e-2, atol=1e-2)
        assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}


GROUPS = {
    "blocks": dict(offload_type="block_level", num_blocks_per_group=1),
    "leaves": dict(offload_type="leaf_level"),
}


@pytest.fixture(params=GROUPS)
def group(request: pytest.FixtureRequest, device: torch.device) -> dict[str, Any]:
    return {"onload_device": device, **GROUPS[request.param]}


def test_group_offload(group: dict[str, Any]):
    """diffusers' groups take adapters along, whichever came first, and eject leaves the groups."""
    batch = inputs(stock_unet())
    stock = forward(stock_unet(), batch)
    device = group["onload_device"]
    for order in ("inject first", "offload first"):
        model = adapted_unet() if order == "inject first" else stock_unet()
        model.enable_group_offload(**group)
        if order == "offload first":
            a3fta.inject(model, a3fta.AdapterConfig(rank=4))
            randomize(model)
        for _ in range(2):
            found = forward(model, {k: v.to(device) for k, v in batch.items()})
            assert_close(found, expected_output())
            assert {p.device.type for p in model.parameters()} == {"cpu"}
        a3fta.eject(model)
        assert_close(forward(model, {k: v.to(device) for k, v in batch.items()}), stock)


@pytest.mark.parametrize("level", ["exact", "block"])
def test_lean_group_offload(group: dict[str, Any], level: str):
    """Weights that only their own module's hook brings are read by that module alone."""
    if group["onload_device"].type != "cpu":
        pytest.skip("group offload on a GPU is for inference: the backward misses the weights")
    model = adapted_unet().train()
    batch = inputs(model)
    loss(model, batch).backward()
    expected = adapter_grads(model)
    model.zero_grad(set_to_none=True)
    model.enable_group_offload(**group)
    report = a3fta.lean(model, level)
    hooked = group["offload_type"] == "leaf_level"
    reasons = {reason.partition(" (")[0] for reason in report.left.values()}
    wanted = {"its norms carry hooks"} if hooked else set()
    if hooked and level == "block":
        wanted.add("a module inside carries hooks")
    assert reasons == wanted
    loss(model, batch).backward()
    for name, grad in adapter_grads(model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("when", ["lean first", "offload first"])
def test_lean_reads_no_norm_past_its_hook(when: str, tmp_path: Path):
    """Leaves on disk are noise between forwards: past the hooks, the output would be too."""
    model = adapted_unet()
    batch = inputs(model)
    expected = expected_output()
    options = dict(onload_device="cpu", offload_to_disk_path=str(tmp_path), **GROUPS["leaves"])
    if when == "lean first":
        a3fta.lean(model, "exact")
    model.enable_group_offload(**options)
    if when == "offload first":
        a3fta.lean(model, "exact")
    for _ in range(2):
        assert_close(forward(model, batch), expected)


def test_weights_on_disk_are_not_read(tmp_path: Path):
    """Between forwards noise is in their place: nobody saves, folds or overwrites it."""
    model = adapted_unet(activation="identity", bias=False)
    a3fta.save_adapter(model, tmp_path / "before")
    batch = inputs(model)
    expected = forward(model, batch)
    options = dict(onload_device="cpu", offload_to_disk_path=str(tmp_path), **GROUPS["blocks"])
    model.enable_group_offload(**options)
    for action, call in {
        "save": lambda: a3fta.save_adapter(model, tmp_path / "after"),
        "load": lambda: a3fta.load_adapter(model, tmp_path / "before"),
        "merge": lambda: a3fta.merge(model),
        "export": lambda: a3fta.export_lora(model, tmp_path / "lora"),
        "freeze_for_inference": lambda: a3fta.freeze_for_inference(model),
    }.items():
        with pytest.raises(ValueError, match=rf"in memory to {action}, got .* to disk; {action}"):
            call()
    assert not (tmp_path / "after").exists() and not (tmp_path / "lora").exists()
    assert_close(forward(model, batch), expected)
