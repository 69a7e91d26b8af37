"""Adapters behind the projection and beside attention, by PEFT: as `inject` has them."""

from __future__ import annotations

import copy
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.peft import A3FTAConfig
from a3fta_kernels.placements import Hand

from .. import models
from ..placed import LATE, late
from .common import BACKEND, added, by_peft, injected, layers, output, run, stock, trains

OTHERS = ("pre", *LATE)
MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


def hands(model: nn.Module) -> list[Hand]:
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Hand)]


def gradients(model: Any, name: str = "sd15") -> dict[str, Tensor]:
    """Of a sum of squares, by the names that `inject` gives the parameters."""
    run(model, name, torch.float64).square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {
        n.replace(".base_layer", "").replace(".a3fta_adapters.", ".adapters."): grad
        for n, grad in found.items()
    }


def placed(**placements: str) -> Any:
    """SD1.5 in float64, by inject an adapter of each name at that placement."""
    model = stock("sd15", torch.float64)
    for seed, (name, placement) in enumerate(placements.items()):
        config = a3fta.AdapterConfig(rank=4, placement=placement)
        a3fta.inject(model, config, name, backend="reference")
        models.randomize(model, name, seed=seed)
    return model


def in_both(**placements: str) -> tuple[Any, Any]:
    """Adapters "inner" and "outer" by `inject`; the outer by PEFT, around inject's layers."""
    twin = placed(**placements)
    model = copy.deepcopy(twin)
    a3fta.eject(model, "outer")
    added(model, twin, "outer")
    a3fta.set_trainable(model)
    return twin, model


@late
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sd3"])
def test_equal_to_inject_bit_for_bit(name: str, placement: str):
    twin = injected(name, placement=placement)
    model = added(stock(name), twin)
    assert {m.a3fta_adapters["a"].config.placement for m in layers(model).values()} == {placement}
    assert len(hands(model)) == (len(layers(model)) if placement == "parallel" else 0)
    before = output(stock(name), name)
    assert not torch.equal(output(model, name), before)
    assert torch.equal(output(model, name), output(twin, name))
    model.disable_adapters()
    assert torch.equal(output(model, name), before)
    model.enable_adapters()
    assert torch.equal(output(copy.deepcopy(model), name), output(twin, name))


@late
@pytest.mark.parametrize("level", [None, "recompute", "block"])
@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_gradients_are_those_of_inject(name: str, level: str | None, placement: str):
    twin = injected(name, dtype=torch.float64, placement=placement)
    model = added(stock(name, torch.float64), twin).train()
    expected = gradients(twin.train(), name)
    if level is not None:
        assert "apart" not in str(a3fta.lean(model, level))
    found = gradients(model, name)
    assert set(found) == set(expected)
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("outer", OTHERS)
@pytest.mark.parametrize("inner", OTHERS)
def test_beside_inject_of_any_placement(inner: str, outer: str):
    """One around the other, in the stock trunk and where blocks are computed again."""
    twin, model = in_both(inner=inner, outer=outer)
    expected = gradients(twin.train())
    for level in ("off", "recompute", "block"):
        one = copy.deepcopy(model)
        a3fta.lean(one, level)
        found = gradients(one.train())
        assert set(found) == set(expected)
        for key, grad in found.items():
            torch.testing.assert_close(grad, expected[key], rtol=1e-9, atol=1e-11, msg=level + key)


@pytest.mark.parametrize("outer", OTHERS)
@pytest.mark.parametrize("inner", OTHERS)
def test_around_adapters_by_sample(inner: str, outer: str):
    """The sample with inject's adapter has both, the other one PEFT's alone."""
    _, model = in_both(inner=inner, outer=outer)
    with torch.no_grad():
        both = run(model, "sd15", torch.float64)
        a3fta.set_adapters(model, [])
        one = run(model, "sd15", torch.float64)
        with a3fta.adapters_per_sample(model, ["inner", None]):
            found = run(model, "sd15", torch.float64)
    assert not torch.allclose(both, one, rtol=1e-3)
    torch.testing.assert_close(found[0], both[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found[1], one[1], rtol=1e-9, atol=1e-11)


def test_adapters_of_all_placements_on_one_layer_with_weights():
    weights = dict(zip(OTHERS, (0.5, 1.0, 1.5), strict=True))
    twin = placed(**{name: name for name in OTHERS})
    model = stock("sd15", torch.float64)
    for name in OTHERS:
        added(model, twin, name)
    a3fta.set_adapters(twin, list(weights), list(weights.values()))
    model.set_adapters(list(weights), list(weights.values()))
    expected = run(twin, "sd15", torch.float64)
    torch.testing.assert_close(run(model, "sd15", torch.float64), expected, rtol=1e-10, atol=1e-12)


@late
def test_beside_a_lora_on_the_same_layer(placement: str):
    lora = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    twin = injected(placement=placement)
    torch.manual_seed(3)
    twin.add_adapter(lora, adapter_name="lora")
    for order in ("lora last", "lora first"):
        model = stock("sd15")
        torch.manual_seed(3)
        if order == "lora first":
            model.add_adapter(lora, adapter_name="lora")
        source = injected(placement=placement)
        added(model, source)
        if order == "lora last":
            torch.manual_seed(3)
            model.add_adapter(lora, adapter_name="lora")
        model.set_adapter(["a", "lora"])
        torch.testing.assert_close(output(model), output(twin), rtol=1e-4, atol=1e-5)


def test_a_layer_that_others_take_out_is_not_kept_alive():
    model = by_peft(placement="parallel")
    alive = [weakref.ref(layer) for layer in layers(model).values()]
    model.unload_lora()
    assert alive and not any(layer() for layer in alive)
    assert torch.equal(output(model), output(stock("sd15")))
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied), output(model)) and not hands(copied)


def test_nothing_stays_of_a_parallel_adapter_that_left():
    model = by_peft(placement="parallel")
    model.delete_adapters("a")
    assert torch.equal(output(model), output(stock("sd15")))

    source = injected(placement="parallel")
    config = A3FTAConfig.from_adapter_config(
        next(iter(a3fta.projections(source).values())).adapters["a"].config, **BACKEND
    )
    wrapped: Any = peft.get_peft_model(stock("sd15"), config)
    assert hands(wrapped)
    model = wrapped.unload()
    assert not hands(model) and torch.equal(output(model), output(stock("sd15")))

    wrapped = peft.get_peft_model(stock("sd15"), config)
    wrapped.add_adapter("second", A3FTAConfig(rank=2, **BACKEND))
    wrapped.delete_adapter("default")
    assert not hands(wrapped)

    # inject's own stay
    _, both = in_both(inner="parallel", outer="parallel")
    before = len(hands(both))
    a3fta.eject(both)
    assert len(hands(both)) == before // 2


def test_what_a_parallel_adapter_cannot_read_is_refused_and_nothing_changes():
    model = by_peft()
    names, before, trained = list(model.state_dict()), output(model), trains(model)
    config = A3FTAConfig(rank=2, target_modules=["to_out.0", "to_q"], placement="parallel")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"layer that consumes attention, .*to_q; choose"):
            peft.inject_adapter_in_model(config, model, "b")
    assert list(model.state_dict()) == names and list(model.peft_config) == ["a"]
    assert not hands(model) and trains(model) == trained and torch.equal(output(model), before)
    with pytest.raises(ValueError, match="placement: expected one of pre, post, parallel"):
        A3FTAConfig(placement="behind")


def test_behind_any_linear_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        hidden = net[1](net[0](x))
    config = A3FTAConfig(rank=2, target_modules=["2"], placement="post", **BACKEND)
    model = peft.inject_adapter_in_model(config, net, "a")
    layer: Any = model[2]
    adapter = layer.a3fta_adapters["a"]
    assert adapter.w_down.shape == (2, 3) and adapter.w_up.shape == (3, 2)
    with torch.no_grad():
        adapter.w_up.normal_()
        y = layer.base_layer(hidden)
        z = nn.functional.gelu(y @ adapter.w_down.T + adapter.b_down)
        expected = y + z @ adapter.w_up.T + adapter.b_up
    torch.testing.assert_close(model(x), expected)


def test_merging():
    model = by_peft(placement="post", activation="identity")
    before = output(model)
    model.fuse_lora()
    assert all(m.merged_adapters for m in layers(model).values())
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    assert torch.equal(output(model), before)

    model = by_peft(placement="parallel", activation="identity")
    with pytest.raises(ValueError, match="in front of the projection, or behind it"):
        model.fuse_lora()
    assert not any(m.merged_adapters for m in layers(model).values())


@late
def test_files_of_both_layouts(placement: str, tmp_path: Path):
    model = by_peft(placement=placement)
    a3fta.save_adapter(model, tmp_path / "ours", "a")
    a3fta.save_adapter(model, tmp_path / "peft", "a", layout="peft")
    for layout in ("ours", "peft"):
        other = stock("sd15")
        a3fta.load_adapter(other, tmp_path / layout, backend="reference")
        assert a3fta.projections(other)[MIDDLE].adapters["default"].config.placement == placement
        assert torch.equal(output(other), output(model))
    again: Any = peft.PeftModel.from_pretrained(stock("sd15"), str(tmp_path / "peft"))
    for layer in layers(again).values():
        layer.backend = "reference"
    assert torch.equal(output(again), output(model))


@late
def test_compiles_without_a_break(placement: str):
    model = by_peft(placement=placement).down_blocks[1].attentions[0].transformer_blocks[0].attn1
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    h = torch.randn(2, 4, 64)
    torch.testing.assert_close(compiled(h), model(h))
