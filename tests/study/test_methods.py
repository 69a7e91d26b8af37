from __future__ import annotations

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.study.methods import METHODS, method
from tests.study.tiny import pipeline

OUT = "to_out.0."


def trained_names(name):
    model = pipeline().unet
    parameters = METHODS[name].prepare(model)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(p.requires_grad for p in parameters)
    assert len(parameters) == sum(p.requires_grad for p in model.parameters())
    return model, [names[id(p)] for p in parameters]


def test_what_trains():
    trained = {name: trained_names(name)[1] for name in METHODS}
    assert trained["base"] == []
    stock = [name for name, _ in pipeline().unet.named_parameters()]
    assert trained["full"] == trained["l2sp"] == stock
    linear = [n for n in stock if ".to_" in n]
    assert sorted(trained["attention"]) == sorted(linear)
    assert {n.split(".to_")[1][0] for n in linear} == {"q", "k", "v", "o"}
    assert all("lora_" in n for n in trained["lora"])
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in trained["lora"]} >= {"to_q", "0"}
    for name in ("identity", "gelu", "film"):
        assert trained[name] and all(".adapters." in n for n in trained[name])
    assert set(trained["gelu"]) < set(trained["film"])
    assert set(trained["adapter+attention"]) == set(trained["gelu"]) | set(linear)


def test_what_trains_of_designs_that_reach_further():
    trained = {
        # PEFT wraps what it is on
        name: {n.replace(".base_layer", "") for n in trained_names(name)[1]} for name in METHODS
    }  # fmt: skip
    vectors = {n for n, p in pipeline().unet.named_parameters() if p.ndim == 1}
    assert trained["affine"] == vectors
    assert trained["out"] == {n for n in trained["attention"] if OUT in n} != set()
    assert (
        trained["scratch"] == trained["full-slow"] == trained["full"]
        and trained["lora-slow"] == trained["lora"]
    )
    assert trained["lora+affine"] == trained["lora"] | vectors
    assert trained["gelu+affine"] == trained["gelu"] | vectors
    assert trained["film+affine"] == trained["film"] | vectors
    qkv = {n for n in trained["lora"] if ".to_out." not in n}
    assert qkv and trained["gelu+lora"] == trained["gelu"] | qkv
    assert trained["film+lora"] == trained["film"] | qkv
    assert trained["film+lora+affine"] == trained["film"] | qkv | vectors
    # a rival reaches as far: what it has not is the adapters, but for LoRA on `out` in their place
    for name, each in METHODS.items():
        if each.rival:
            rest = {n for n in trained[name] - trained[each.rival] if ".adapters." not in n}
            more = {n for n in trained[each.rival] - trained[name] if ".to_out." not in n}
            assert not rest and not more, name
    assert trained["film+attention"] == trained["film"] | trained["attention"]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_all_that_trains_is_told_where_to_go(name):
    """The fused backward is for frozen weights: one that trains beside must not be left out."""
    model = pipeline().unet.train()
    parameters = METHODS[name].prepare(model)
    for parameter in parameters:
        # what starts at 0 would hide what trains before it
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x, t, y = torch.randn(4, 1, 8, 8), torch.tensor([5, 900, 80, 300]), torch.tensor([0, 1, 0, 1])
    model(x, t, class_labels=y).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    # a shift of all keys changes no attention
    assert all(n.endswith("to_k.bias") for n in silent)


def test_new_weights_are_not_those_of_the_base():
    stock, model = pipeline().unet, pipeline().unet
    torch.manual_seed(3)
    METHODS["scratch"].prepare(model)
    for (name, p), q in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert not torch.equal(p, q), name


@pytest.mark.parametrize("name", [name for name in METHODS if name != "scratch"])
def test_nothing_changes_before_it_trains(name):
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 1])
    before = pipeline().unet.eval()
    after = pipeline().unet
    METHODS[name].prepare(after)
    with torch.no_grad():
        same = after.eval()(x, t, class_labels=y).sample
        assert torch.allclose(same, before(x, t, class_labels=y).sample, atol=1e-6)


def test_the_linear_adapter_is_lora_on_the_output_projection():
    """A = w_down, B = scale * weight @ w_up: the same function, and the same steps down to it."""
    from peft import LoraConfig, inject_adapter_in_model

    ours, theirs = pipeline().unet, pipeline().unet
    config = a3fta.AdapterConfig(rank=4, activation="identity", bias=False)
    a3fta.inject(ours, config)
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_out.0"], use_rslora=False), theirs
    )
    layers = {n: m for n, m in ours.named_modules() if n.endswith("to_out.0")}
    for name, layer in layers.items():
        adapter, lora = layer.adapters["default"], theirs.get_submodule(name)
        with torch.no_grad():
            adapter.w_up.normal_(0, 0.3)
            lora.lora_A["default"].weight.copy_(adapter.w_down)
            lora.lora_B["default"].weight.copy_(layer.weight @ adapter.w_up)
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 1])
    a, b = (m.eval()(x, t, class_labels=y).sample for m in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-5)
    assert not torch.allclose(a, pipeline().unet.eval()(x, t, class_labels=y).sample, atol=1e-3)


def test_every_method_has_as_many_learning_rates_and_one_of_a_kind():
    trials = {name: m.trials for name, m in METHODS.items() if name != "base"}
    assert len({len(t) for t in trials.values()}) == 1
    assert all(list(t) == sorted(set(t)) for t in trials.values())
    assert METHODS["l2sp"].pull > 0 and METHODS["full"].pull == 0


def test_a_method_that_is_not_there_is_told():
    with pytest.raises(ValueError, match=r"method: expected one of base, full, .*, got 'lorra'"):
        method("lorra")
