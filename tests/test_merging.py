"""merge and unmerge: the algebra, the kept copy, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels import processors

from . import models
from .models import assert_unchanged, snapshot

LINEAR = a3fta.AdapterConfig(rank=4, activation="identity", scale=0.7)


def make(config=LINEAR, name="sd15", dtype=torch.float64, **options):
    model = models.build(name, dtype=dtype, **options)
    a3fta.inject(model, config)
    models.randomize(model)
    return model


def run(model, name="sd15", dtype=torch.float64):
    with torch.no_grad():
        return models.run(model, name, dtype=dtype)


def strip_biases(model):
    for site in processors.family_of(model).sites(model):
        for layer in site.projections.values():
            layer.bias = None


@pytest.mark.parametrize(("name", "count"), [("sd15", 8), ("flux", 6)])
@pytest.mark.parametrize("bias", [True, False], ids=["adapter bias", "no adapter bias"])
@pytest.mark.parametrize("own_bias", [True, False], ids=["layer bias", "no layer bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_and_unmerge(bias, own_bias, dtype, name, count):
    model = models.build(name, dtype=dtype)
    if not own_bias:
        strip_biases(model)
    config = a3fta.AdapterConfig(rank=4, activation="identity", scale=0.7, bias=bias)
    a3fta.inject(model, config)
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, activation="identity"), name="second")
    models.randomize(model)
    models.randomize(model, "second", seed=4)
    a3fta.set_adapters(model, ["default", "second"], [1.5, -0.5])
    before, expected = snapshot(model), run(model, name, dtype)
    a3fta.merge(model)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert torch.allclose(run(model, name, dtype), expected, atol=tolerance)
    layers = a3fta.projections(model)
    changed = [n for n, x in layers.items() if not torch.equal(x.weight, x.merged.weight)]
    assert len(changed) == count
    a3fta.unmerge(model)
    assert_unchanged(model, before)
    assert torch.equal(run(model, name, dtype), expected)


def test_only_the_columns_of_attention_are_merged_into():
    model = make(name="flux")
    a3fta.merge(model)
    layers = a3fta.projections(model).values()
    sliced = [layer for layer in layers if layer.columns is not None]
    assert len(sliced) == 2
    for layer in sliced:
        same = layer.weight == layer.merged.weight
        assert not same[:, :32].any() and same[:, 32:].all()


def test_merged_layers_run_the_stock_layer():
    model = make()
    a3fta.merge(model)
    for layer in a3fta.projections(model).values():
        h = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        assert torch.equal(layer(h), nn.functional.linear(h, layer.weight, layer.bias))


def test_merged_deepcopy_unmerges_on_its_own():
    model = make()
    expected = run(model)
    a3fta.merge(model)
    merged, twin = run(model), copy.deepcopy(model)
    a3fta.unmerge(twin)
    assert torch.equal(run(twin), expected) and torch.equal(run(model), merged)


@pytest.mark.parametrize(
    ("config", "prepare", "message"),
    [
        (a3fta.AdapterConfig(rank=4), None, r"adapter 'default' with activation='gelu' at down"),
        (
            a3fta.AdapterConfig(rank=4, activation="identity", dropout=0.1),
            lambda m: m.train(),
            "adapter 'default' with dropout=0.1",
        ),
        (LINEAR, lambda m: a3fta.disable_adapters(m), "expected active adapters to merge"),
        (LINEAR, lambda m: a3fta.set_adapters(m, []), "expected active adapters to merge"),
        (
            LINEAR,
            lambda m: a3fta.inject(m, a3fta.AdapterConfig(rank=2, targets="mid_block"), "curved"),
            "adapter 'curved' with activation='gelu' at mid_block",
        ),
    ],
)
def test_refused(config, prepare, message):
    model = make(config)
    if prepare is not None:
        prepare(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        a3fta.merge(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="expected merged adapters, got none"):
        a3fta.unmerge(model)


def test_a_weight_that_is_not_plain_is_refused():
    class Odd(nn.Linear):
        pass

    model = models.build("sd15")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
    model.get_submodule(name).__class__ = Odd
    a3fta.inject(model, LINEAR)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"plain weights to merge into, got {name}: .*class Odd"):
        a3fta.merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_around_the_projection_is_refused(lora_first):
    peft = pytest.importorskip("peft")
    model = models.build("sd15")
    lora = peft.LoraConfig(r=2, target_modules=["to_out.0"])
    if lora_first:
        model.add_adapter(lora)
    a3fta.inject(model, LINEAR)
    if not lora_first:
        model.add_adapter(lora)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"without PEFT's layers around them, got down_blocks"):
        a3fta.merge(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "call",
    [
        a3fta.merge,
        a3fta.eject,
        lambda m: a3fta.eject(m, "default"),
        lambda m: a3fta.inject(m, LINEAR, name="second"),
        lambda m: a3fta.set_adapters(m, "default", 0.5),
        a3fta.disable_adapters,
        a3fta.enable_adapters,
        lambda m: a3fta.disabled(m).__enter__(),
    ],
)
def test_merged_models_are_unmerged_first(call):
    model = make()
    a3fta.merge(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="call unmerge first"):
        call(model)
    assert_unchanged(model, before)


def test_loading_into_a_merged_model_is_refused():
    model = make()
    stock = models.build("sd15", dtype=torch.float64).state_dict()
    a3fta.merge(model)
    merged = run(model)
    with pytest.raises(RuntimeError, match="an adapter is merged into it; call unmerge first"):
        model.load_state_dict(stock, strict=False)
    assert torch.equal(run(model), merged)
