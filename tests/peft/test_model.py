"""A3FTA by PEFT computes what `inject` computes, and PEFT's own verbs work on it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.peft import A3FTAConfig, A3FTALinear

from .. import models
from .common import (
    BACKEND,
    FAMILIES,
    added,
    by_peft,
    fill,
    injected,
    layers,
    output,
    run,
    stock,
    tensors,
    trains,
)

OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "identity", "bias": False, "scale": 0.5},
    {"design": "gated", "rank_pattern": {"blocks.1": 2}},
    {"design": "scaled", "activation": "silu", "targets": r"attn\d?\.to_out", "dropout": 0.5},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_adapter_changes_nothing_and_trains_alone(name: str):
    model = stock(name)
    before = output(model, name)
    config = A3FTAConfig(rank=4, **BACKEND)
    model.add_adapter(config, adapter_name="a")
    assert torch.equal(output(model, name), before)
    assert config.target_modules is None  # and serves another model
    found = layers(model)
    twin = injected(name)
    assert {n: m.columns for n, m in found.items()} == {
        n: p.columns for n, p in a3fta.projections(twin).items()
    }
    assert trains(model) == {
        f"{n}.a3fta_adapters.a.{p}" for n in found for p in ("w_down", "w_up", "b_down", "b_up")
    }
    assert not a3fta.projections(model)


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in ("sd15", "flux") for options in OPTIONS]
    + [("sdxl", {}), ("sd3", {})],
    ids=str,
)
def test_equal_to_inject_bit_for_bit(name: str, options: dict[str, Any]):
    twin = injected(name, **options)
    if options.get("targets") and name == "flux":
        assert len(a3fta.projections(twin)) == 2  # the dual blocks' alone
    model = added(stock(name), twin)
    assert not torch.equal(output(model, name), output(stock(name), name))
    assert torch.equal(output(model, name), output(twin, name))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_inject(name: str):
    twin = injected(name, dtype=torch.float64)
    model = added(stock(name, torch.float64), twin)
    for one in (twin, model):
        run(one, name, torch.float64).square().sum().backward()
    expected = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, key
            continue
        other = expected[key.replace(".a3fta_adapters.", ".adapters.")]
        assert parameter.dtype == torch.float64 and other.grad.abs().max() > 0
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-11, atol=1e-13)


def test_flux_single_blocks_adapt_attentions_columns_alone():
    model = by_peft("flux")
    layer = model.single_transformer_blocks[0].proj_out
    inside = model.single_transformer_blocks[0].attn.inner_dim
    assert layer.columns == (0, inside) and layer.in_features > inside
    h = torch.randn(1, 3, layer.in_features)
    other = h.clone()
    other[..., inside:] += 1
    with torch.no_grad():
        changes = [layer(x) - layer.base_layer(x) for x in (h, other)]
    assert changes[0].abs().max() > 1e-3
    torch.testing.assert_close(*changes, rtol=0, atol=1e-5)
    # named, a layer that reads attention keeps attention's columns
    named = stock("flux")
    named.add_adapter(A3FTAConfig(target_modules=["proj_out"], rank=4))
    assert named.single_transformer_blocks[0].proj_out.columns == (0, inside)
    assert named.proj_out.columns is None


def test_a_model_of_another_kind_by_names():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.mix(x))

    model = nn.Sequential(Block(), Block())
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=r"target_modules: .* of a Sequential is known to read"):
        peft.get_peft_model(model, A3FTAConfig())
    models.assert_unchanged(model, before)
    wrapped = peft.get_peft_model(model, A3FTAConfig(rank=2, target_modules=["out"]))
    assert [name for name in layers(model)] == ["0.out", "1.out"]
    wrapped(torch.randn(2, 8)).sum().backward()
    assert model[1].out.a3fta_adapters["default"].w_up.grad.abs().max() > 0


def test_two_adapters_act_with_weights_and_leave():
    adapters = {"a": 2, "b": 5}
    twin, model = injected(adapters=adapters), by_peft(adapters=adapters)
    assert torch.equal(output(model), output(twin))
    model.set_adapters(["a", "b"], [0.5, -2.0])
    a3fta.set_adapters(twin, ["a", "b"], [0.5, -2.0])
    weighted = output(model)
    assert torch.equal(weighted, output(twin))
    model.disable_adapters()
    assert torch.equal(output(model), output(stock("sd15")))
    assert not trains(model)
    model.enable_adapters()
    assert torch.equal(output(model), weighted)

    model.set_adapter("b")
    a3fta.set_adapters(twin, "b", -2.0)
    assert torch.equal(output(model), output(twin))
    assert trains(model) == {n for n, _ in model.named_parameters() if ".a3fta_adapters.b." in n}
    model.set_adapters(["a", "b"])
    model.delete_adapters("a")
    a3fta.set_adapters(twin, "b")
    assert torch.equal(output(model), output(twin))
    assert not [n for n in model.state_dict() if ".a3fta_adapters.a." in n]


def test_diffusers_scale_of_a_call():
    model, twin = by_peft(), injected()
    a3fta.set_adapters(twin, "a", 0.25)
    with torch.no_grad():
        scaled = model(**models.inputs("sd15"), cross_attention_kwargs={"scale": 0.25}).sample
    assert torch.equal(scaled, output(twin))
    assert torch.equal(output(model), output(injected()))


def test_unload_gives_the_stock_model():
    model = by_peft()
    model.unload_lora()
    before = models.snapshot(stock("sd15"))
    after = models.snapshot(model)
    assert after["classes"] == before["classes"]
    assert list(after["state"]) == list(before["state"])
    assert torch.equal(output(model), output(stock("sd15")))


def test_state_dicts_come_and_go():
    twin, model = injected(), by_peft()
    state = peft.get_peft_model_state_dict(model, adapter_name="a")
    expected = tensors(twin)
    assert set(state) == set(expected)
    assert all(torch.equal(state[k], expected[k]) for k in state)
    other = peft.inject_adapter_in_model(A3FTAConfig(rank=4, **BACKEND), stock("sd15"), "other")
    peft.set_peft_model_state_dict(other, state, "other")
    assert torch.equal(output(other), output(twin))
    # layers by the state dict, on the meta device until its values come
    empty = peft.inject_adapter_in_model(
        A3FTAConfig(rank=4, **BACKEND), stock("sd15"), "a", low_cpu_mem_usage=True, state_dict=state
    )
    assert all(p.device.type == "meta" for n, p in empty.named_parameters() if "a3fta_" in n)
    peft.set_peft_model_state_dict(empty, state, "a", low_cpu_mem_usage=True)
    assert torch.equal(output(empty), output(twin))


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_pretrained_folders(name: str, tmp_path: Path):
    twin = injected(name, rank_pattern={"blocks.1": 2}, scale=0.5)
    options = {"rank_pattern": {r".*blocks\.1.*": 2}, "scale": 0.5}
    wrapped = peft.get_peft_model(stock(name), A3FTAConfig(rank=4, **options, **BACKEND))
    fill(wrapped.get_base_model(), twin_named(twin), "default")
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(stock(name), str(tmp_path), is_trainable=True)
    for layer in layers(again).values():
        layer.backend = "reference"
    assert torch.equal(output(again, name), output(twin, name))
    assert again.peft_config["default"].to_adapter_config().scale == 0.5
    assert trains(again) and all("a3fta_adapters.default" in n for n in trains(again))
    status = again.get_model_status()
    assert status.adapter_model_type == "A3FTAModel" and status.enabled is True


def twin_named(twin: Any) -> Any:
    """With its adapter "a" called "default"."""
    for layer in a3fta.projections(twin).values():
        layer.adapters["default"] = layer.adapters.pop("a")
        layer.choose({"default": layer.weights["a"]})
    return twin


def test_several_adapters_of_a_peft_model():
    twin = injected(adapters={"a": 2, "b": 5})
    wrapped = peft.get_peft_model(stock("sd15"), A3FTAConfig(rank=4, **BACKEND), "a")
    wrapped.add_adapter("b", A3FTAConfig(rank=4, **BACKEND))
    for name in ("a", "b"):
        fill(wrapped.get_base_model(), twin, name)
    assert trains(wrapped) and not [n for n in trains(wrapped) if ".b." in n]
    a3fta.set_adapters(twin, "a")
    assert torch.equal(output(wrapped), output(twin))
    wrapped.set_adapter("b")
    a3fta.set_adapters(twin, "b")
    assert torch.equal(output(wrapped), output(twin))
    with wrapped.disable_adapter():
        assert torch.equal(output(wrapped), output(stock("sd15")))
    wrapped.base_model.set_adapter(["a", "b"])
    a3fta.set_adapters(twin, ["a", "b"])
    assert torch.equal(output(wrapped), output(twin))
    wrapped.delete_adapter("a")
    a3fta.set_adapters(twin, "b")
    assert torch.equal(output(wrapped), output(twin))
    with pytest.raises(ValueError, match="different peft types"):
        wrapped.add_adapter("c", peft.LoraConfig(target_modules=["to_q"]))


def test_another_adapter_later_has_its_own_layers_and_rank():
    model = by_peft()
    config = A3FTAConfig(rank=2, target_modules=r".*attn2\.to_out\.0", **BACKEND)
    model.add_adapter(config, adapter_name="b")
    for name, layer in layers(model).items():
        assert layer.r == ({"a": 4, "b": 2} if "attn2" in name else {"a": 4})
    assert trains(model) == {n for n, _ in model.named_parameters() if ".a3fta_adapters.b." in n}


def test_a_refused_adapter_leaves_the_model_as_it_was():
    model = by_peft()
    names = list(model.state_dict())
    before, trained = output(model), trains(model)

    def refuse(config: A3FTAConfig, match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, model, "b")
        assert list(model.state_dict()) == names and list(model.peft_config) == ["a"]
        assert trains(model) == trained and torch.equal(output(model), before)

    refuse(A3FTAConfig(target_modules=["to_out.0", "conv1"]), "conv1, a Conv2d", TypeError)
    refuse(A3FTAConfig(target_modules=["nothing"]), "not found in the base model")
    merged = injected(activation="identity")
    a3fta.merge(merged)
    with pytest.raises(ValueError, match=r"call a3fta_kernels\.unmerge first"):
        merged.add_adapter(A3FTAConfig(), adapter_name="b")
    assert not layers(merged)


def test_dropout_follows_the_model():
    model = stock("sd15")
    model.add_adapter(A3FTAConfig(dropout=0.5, **BACKEND), adapter_name="a")
    adapters = [m.a3fta_adapters["a"] for m in layers(model).values()]
    assert not any(adapter.training for adapter in adapters)
    model.train()
    assert all(adapter.kept(2, torch.device("cpu")) is not None for adapter in adapters)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_time_aware(name: str):
    source = injected(name, {"a": 3}, design="film")
    model = stock(name)
    added(model, source, "a")
    early, late = (models.inputs(name) for _ in range(2))
    late["timestep"] = late["timestep"] * 0 + 0.9
    with torch.no_grad():
        expected = [source(**batch).sample for batch in (early, late)]
        found = [model(**batch).sample for batch in (early, late)]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="timestep"):
        peft.inject_adapter_in_model(A3FTAConfig(design="film"), stock(name).get_submodule(
            "mid_block" if name == "sd15" else "single_transformer_blocks"
        ))  # fmt: skip


def test_time_aware_beside_inject():
    """Whoever goes first leaves the other its timestep."""
    model = stock("sd15")
    model.add_adapter(A3FTAConfig(rank=2, design="film", **BACKEND), adapter_name="theirs")
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, design="film"), "ours")
    a3fta.eject(model)
    output(model)
    model = stock("sd15")
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, design="film"))
    model = peft.get_peft_model(model, A3FTAConfig(rank=2, design="film", **BACKEND)).unload()
    output(model)
    assert len(model._forward_pre_hooks) == 1
    a3fta.eject(model)
    assert not model._forward_pre_hooks and not model._forward_hooks
    wrapped = peft.get_peft_model(model, A3FTAConfig(rank=2, design="film", **BACKEND), "a")
    wrapped.add_adapter("b", A3FTAConfig(rank=2, **BACKEND))
    wrapped.delete_adapter("a")
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_half_precision_bases_train_in_float32():
    model = stock("sd15", torch.bfloat16)
    model.add_adapter(A3FTAConfig(rank=4), adapter_name="a")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    run(model, "sd15", torch.bfloat16).float().sum().backward()
    first = next(p for n, p in model.named_parameters() if n.endswith("a.w_up"))
    assert first.grad.dtype == torch.float32 and first.grad.abs().max() > 0


def test_copies_and_our_processors():
    twin, model = injected(), by_peft()
    copied = copy.deepcopy(model)
    assert torch.equal(output(copied), output(twin))
    model.set_attn_processor(a3fta.processors.A3FTAAttnProcessor())
    assert torch.equal(output(model), output(twin))


@pytest.mark.parametrize("level", ["exact", "block"])
def test_on_a_lean_trunk(level: str):
    twin, model = injected(), by_peft()
    a3fta.lean(model, level)
    model.train()
    run(twin, "sd15").square().sum().backward()
    run(model, "sd15").square().sum().backward()
    expected = dict(twin.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            other = expected[key.replace(".a3fta_adapters.", ".adapters.")].grad
            torch.testing.assert_close(parameter.grad, other, rtol=1e-3, atol=1e-4)


def test_compiles_without_a_break():
    model = by_peft().down_blocks[1].attentions[0].transformer_blocks[0].attn1
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    h = torch.randn(2, 4, 64)
    torch.testing.assert_close(compiled(h), model(h))


def test_the_type_is_one_of_pefts():
    kind = peft.PeftType("A3FTA")
    assert kind is peft.PeftType.A3FTA and kind == "A3FTA" and kind in list(peft.PeftType)
    assert copy.deepcopy(kind) is kind
    config = peft.get_peft_config({"peft_type": "A3FTA", "rank": 3})
    assert isinstance(config, A3FTAConfig) and config.rank == 3
    assert issubclass(A3FTALinear, a3fta.projection.AdaptedProjectionMixin)
