"""float32 adapters on a half-precision trunk train under a gradient scaler."""

from __future__ import annotations

import pytest
import torch

import a3fta_kernels as a3fta

from .common import adapted_unet, inputs, loss, randomize, stock_unet


def half_unet(dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    model = stock_unet(device).to(dtype)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    randomize(model)
    model.train()
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_are_float32_and_step(dtype: torch.dtype, device: torch.device):
    model = half_unet(dtype, device)
    parameters = list(a3fta.trainable_parameters(model))
    assert {p.dtype for p in parameters} == {torch.float32}
    trunk = {n: p for n, p in model.named_parameters() if ".adapters." not in n}
    assert {p.dtype for p in trunk.values()} == {dtype}
    frozen = {n: p.clone() for n, p in trunk.items()}
    before = [p.detach().clone() for p in parameters]

    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    value = loss(model, inputs(model))
    scaler.scale(value).backward()
    scaled = [p.grad.clone() for p in parameters]
    scaler.unscale_(optimizer)  # raises on float16 gradients
    for parameter, grad in zip(parameters, scaled, strict=True):
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, grad / 1024)
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert norm.isfinite() and norm > 0
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1024.0, "the step was skipped"

    for parameter, old in zip(parameters, before, strict=True):
        assert not torch.equal(parameter, old)
    for name, old in frozen.items():
        assert torch.equal(trunk[name], old), name


def test_gradients_are_those_of_the_float32_model(device: torch.device):
    """Up to the trunk's rounding."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = half_unet(dtype, device)
        loss(model, inputs(model)).backward()
        grads.append(torch.cat([p.grad.flatten() for p in a3fta.trainable_parameters(model)]))
    error = (grads[0] - grads[1]).norm() / grads[0].norm()
    assert error < 0.1, f"relative error {error:.3f}"


def test_a_scale_that_overflows_skips_the_step(device: torch.device):
    model = half_unet(torch.float16, device)
    parameters = list(a3fta.trainable_parameters(model))
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40)
    scaler.scale(loss(model, inputs(model))).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter, old)


def test_adapters_of_another_dtype_on_request(device: torch.device):
    model = stock_unet(device).to(torch.bfloat16)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, dtype=torch.bfloat16))
    assert {p.dtype for p in a3fta.trainable_parameters(model)} == {torch.bfloat16}
    randomize(model)
    loss(model, inputs(model)).backward()
    for parameter in a3fta.trainable_parameters(model):
        assert parameter.grad.dtype == torch.bfloat16 and parameter.grad.isfinite().all()


def test_half_of_the_whole_model_keeps_float32_adapters(device: torch.device):
    model = adapted_unet(device)
    before = [p.detach().clone() for p in a3fta.trainable_parameters(model)]
    model.to(torch.bfloat16)
    after = list(a3fta.trainable_parameters(model))
    for parameter, old in zip(after, before, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(parameter, old)
    loss(model, inputs(model)).backward()
    assert all(p.grad.isfinite().all() for p in after)
