"""PEFT LoRA beside an adapter: before and after it, on its layer and on others: both train."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig
from torch import nn

import a3fta_kernels as a3fta

from .common import forward, inputs, loss, randomize, stock_unet

TARGETS = {
    "same-layer": ["to_out.0"],
    "other-layers": ["to_q", "to_k"],
    "both": ["to_q", "to_out.0"],
}


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".lora_" in n}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".adapters." in n}


def with_both(order: str, targets: list[str], device: torch.device | str = "cpu") -> nn.Module:
    model = stock_unet(device)
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=targets)
    config = a3fta.AdapterConfig(rank=4)
    if order == "lora first":
        model.add_adapter(lora)
        a3fta.inject(model, config)
        for parameter in lora_parameters(model).values():
            parameter.requires_grad_(True)
    else:
        a3fta.inject(model, config)
        model.add_adapter(lora)
        a3fta.set_trainable(model)
    randomize(model)
    return model


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_both_train(order: str, targets: list[str], device: torch.device):
    model = with_both(order, targets, device)
    model.train()
    loras, adapters = lora_parameters(model), adapter_parameters(model)
    layers = a3fta.projections(model)
    assert len(adapters) == 4 * len(layers) and len(layers) > 0
    assert len(loras) == 2 * len(targets) * len(layers)
    assert not any("base_layer" in name for name in layers)

    trained = {**loras, **adapters}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trained)
    before = {n: p.detach().clone() for n, p in trained.items()}
    loss(model, inputs(model)).backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    torch.optim.AdamW(trained.values(), lr=1e-2).step()
    for name, parameter in trained.items():
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_output_is_lora_of_the_adapted_layer(order: str):
    """On one layer: y = W h' + b + LoRA(h) whatever came first."""
    model = with_both(order, ["to_out.0"])
    name, inner = next(iter(a3fta.projections(model).items()))
    outer = model.get_submodule(name)
    h = torch.randn(2, 7, inner.in_features)
    adapter = inner.adapters["default"]
    with torch.no_grad():
        a = h @ adapter.w_down.T + adapter.b_down
        adapted = h + torch.nn.functional.gelu(a) @ adapter.w_up.T + adapter.b_up
        y = adapted @ inner.weight.T + inner.bias
        lora_a, lora_b = outer.lora_A["default"].weight, outer.lora_B["default"].weight
        y = y + h @ lora_a.T @ lora_b.T
        torch.testing.assert_close(outer(h), y, rtol=1e-5, atol=1e-5)


def test_add_adapter_freezes_and_the_warning_says_what_to_do():
    model = stock_unet()
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(a3fta.trainable_parameters(model))
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.warns(UserWarning, match="set_trainable"):
        list(a3fta.trainable_parameters(model))
    a3fta.set_trainable(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(a3fta.trainable_parameters(model))
    assert {id(p) for p in found} == {id(p) for p in adapter_parameters(model).values()}
    assert all(p.requires_grad for p in lora_parameters(model).values())


@pytest.mark.parametrize("order", ["lora first", "adapter first"])
def test_each_leaves_without_the_other(order: str):
    model = with_both(order, TARGETS["both"])
    batch = inputs(model)
    both = forward(model, batch)

    a3fta.disable_adapters(model)
    lora_only = forward(model, batch)
    a3fta.enable_adapters(model)
    assert torch.equal(forward(model, batch), both)

    model.disable_adapters()  # PEFT's
    adapter_only = forward(model, batch)
    model.enable_adapters()
    assert torch.equal(forward(model, batch), both)

    a3fta.eject(model)
    assert not adapter_parameters(model)
    assert torch.equal(forward(model, batch), lora_only)
    outputs = [both, lora_only, adapter_only]
    assert not any(torch.equal(x, y) for x in outputs for y in outputs if x is not y)


def test_lora_leaves_first():
    model = with_both("adapter first", TARGETS["both"])
    model.disable_adapters()
    batch = inputs(model)
    adapter_only = forward(model, batch)
    model.delete_adapters("default")
    assert torch.equal(forward(model, batch), adapter_only)
    assert len(adapter_parameters(model)) == 4 * len(a3fta.projections(model))
