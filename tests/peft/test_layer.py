"""A3FTALinear: merging, LoRA on the same layer, `inject` on the same layer, bases that are not
plain."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.peft import A3FTAConfig, A3FTALinear

from .. import models
from .common import (
    BACKEND,
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

LINEAR = {"activation": "identity"}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        n.replace(".base_layer", ""): p.clone()
        for n, p in model.state_dict().items()
        if "a3fta_" not in n and "lora_" not in n
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_merge_and_unmerge(name: str):
    model, twin = by_peft(name, **LINEAR, scale=0.5), injected(name, **LINEAR, scale=0.5)
    adapted, before = output(model, name), base_state(model)
    model.fuse_lora()  # diffusers' name for the merge of any method
    a3fta.merge(twin)
    merged = base_state(model)
    expected = {k: v for k, v in twin.state_dict().items() if ".adapters." not in k}
    assert all(torch.equal(merged[k], expected[k]) for k in expected)
    close(output(model, name), adapted)
    assert not same(merged, before)
    model.unfuse_lora()
    assert same(base_state(model), before)
    assert torch.equal(output(model, name), adapted)


def test_merge_and_unload_leaves_a_stock_model():
    source = injected(adapters={"a": 2, "b": 5}, **LINEAR)
    wrapped = peft.get_peft_model(stock("sd15"), A3FTAConfig(rank=4, **LINEAR, **BACKEND), "a")
    wrapped.add_adapter("b", A3FTAConfig(rank=4, **LINEAR, **BACKEND))
    for name in ("a", "b"):
        fill(wrapped.get_base_model(), source, name)
    wrapped.base_model.set_adapter(["a", "b"])
    expected = output(wrapped)
    merged = wrapped.merge_and_unload(safe_merge=True)
    assert {n: type(m) for n, m in merged.named_modules()} == {
        n: type(m) for n, m in stock("sd15").named_modules()
    }
    close(output(merged), expected)


def test_adapters_merge_one_after_the_other():
    """The second one into the weights that the first had, not into those it made."""
    model = by_peft(adapters={"a": 2, "b": 5}, **LINEAR)
    expected, before = output(model), base_state(model)
    for layer in layers(model).values():
        layer.merge(adapter_names=["a"])
        with pytest.warns(UserWarning, match="additionally merging b"):
            layer.merge(adapter_names=["b"])
        assert layer.merged_adapters == ["a", "b"] and layer.merged
        with pytest.warns(UserWarning, match="nothing to do"):
            layer.merge()
    close(output(model), expected)
    model.disable_adapters()
    assert same(base_state(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        next(iter(layers(model).values())).unmerge()


def test_a_merge_makes_a_bias_and_takes_it_back():
    layer = small_layer("a", bias=False)
    h = torch.randn(3, 8)
    expected = layer(h)
    layer.merge()
    assert layer.base_layer.bias is not None
    close(layer(h), expected)
    layer.unmerge()
    assert layer.base_layer.bias is None and layer.bias is None


def small_layer(*names: str, bias: bool = True) -> A3FTALinear:
    layer = A3FTALinear(nn.Linear(8, 6, bias=bias))
    config = A3FTAConfig(rank=2, **LINEAR).to_adapter_config()
    for name in names:
        layer.update_layer(name, a3fta.adapters.BottleneckAdapter(8, 2, config))
    layer.set_adapter(list(names))
    for parameter in layer.a3fta_adapters.parameters():
        nn.init.normal_(parameter)
    return layer


def test_unmerge_gives_back_what_no_difference_would():
    """The zero that has a sign, and what a merge made infinite or not a number."""
    layer = small_layer("a")
    with torch.no_grad():
        layer.base_layer.weight[0] = -0.0
        layer.base_layer.weight[1] = 9.0
        layer.a3fta_adapters["a"].w_up[0] = 3e38
        layer.a3fta_adapters["a"].b_down[0] = float("nan")
    before = base_state(layer.base_layer)
    layer.merge()
    merged = base_state(layer.base_layer)
    assert not merged["weight"][1].isfinite().any() and merged["bias"].isnan().all()
    layer.unmerge()
    after = base_state(layer.base_layer)
    assert same(after, before)
    assert all(torch.equal(after[k].signbit(), before[k].signbit()) for k in before)


def test_what_others_added_between_two_merges_stays():
    layer, twin = small_layer("a", "b"), nn.Linear(8, 6)
    twin.load_state_dict(layer.base_layer.state_dict())
    h, lora = torch.randn(3, 8), torch.randn(6, 8)
    expected = layer(h) + h @ lora.T
    layer.merge(adapter_names=["a"])
    with torch.no_grad():
        layer.base_layer.weight += lora
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])
    close(layer(h), expected)
    layer.unmerge()
    close(layer.base_layer.weight, twin.weight + lora)
    assert torch.equal(layer.base_layer.bias, twin.bias)


def refused(model: Any, match: str, act: Any) -> None:
    before = base_state(model)
    with pytest.raises(ValueError, match=match):
        act()
    assert same(base_state(model), before)
    assert not any(layer.merged for layer in layers(model).values())


def test_what_cannot_merge_says_why_and_changes_nothing():
    # the second adapter, which is on the last layer alone, is not linear
    wrapped = peft.get_peft_model(by_peft(**LINEAR), A3FTAConfig(rank=4, **LINEAR), "c")
    wrapped.add_adapter("b", A3FTAConfig(rank=2, target_modules=r"mid.*attn2\.to_out\.0"))
    wrapped.base_model.set_adapter(["c", "b"])
    for act in (wrapped.merge_adapter, wrapped.merge_and_unload):
        refused(wrapped, "adapter 'b' with activation='gelu' at mid_block", act)
    wrapped.base_model.set_adapter(["c"])
    last = list(layers(wrapped).values())[-1]
    with torch.no_grad():
        last.a3fta_adapters["c"].w_up.fill_(float("nan"))
    refused(
        wrapped, "finite numbers after merging c", lambda: wrapped.merge_adapter(safe_merge=True)
    )
    gelu = by_peft()
    refused(gelu, "linear adapters to merge", gelu.fuse_lora)
    dropping = by_peft(**LINEAR, dropout=0.5).train()
    refused(dropping, "without dropout to merge", dropping.fuse_lora)


def lora(targets: tuple[str, ...] = ("to_out.0", "to_q")) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=2, init_lora_weights=False, target_modules=list(targets))


def with_lora(order: str, **options: Any) -> tuple[Any, Any]:
    """A3FTA and a LoRA by PEFT; the same by `inject` and PEFT."""
    source = injected(**options)
    model = stock("sd15")
    torch.manual_seed(3)
    if order == "lora first":
        model.add_adapter(lora(), adapter_name="lora")
        added(model, source)
    else:
        added(model, source)
        model.add_adapter(lora(), adapter_name="lora")
    model.set_adapters(["a", "lora"])
    twin = copy.deepcopy(source)
    twin.add_adapter(lora(), adapter_name="lora")
    state = {k: v for k, v in model.state_dict().items() if ".lora_" in k}
    peft.set_peft_model_state_dict(
        twin, peft.get_peft_model_state_dict(model, adapter_name="lora"), "lora"
    )
    assert len(state) == len([k for k in twin.state_dict() if ".lora_" in k])
    return model, twin


ORDERS = pytest.mark.parametrize("order", ["lora first", "a3fta first"])


@ORDERS
def test_beside_a_lora_on_the_same_layer(order: str):
    """y = W h' + b + LoRA(h) whatever came first, as with `inject`."""
    model, twin = with_lora(order)
    assert torch.equal(output(model), output(twin))
    found = trains(model)
    assert {n for n in found if ".lora_" in n} and {n for n in found if ".a3fta_adapters.a." in n}
    run(model, "sd15").sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    # the file knows nothing of the LoRA
    state = peft.get_peft_model_state_dict(model, adapter_name="a")
    assert set(state) == set(tensors(injected()))
    fresh = peft.inject_adapter_in_model(A3FTAConfig(rank=4, **BACKEND), stock("sd15"), "a")
    assert not peft.set_peft_model_state_dict(fresh, state, "a").unexpected_keys
    model.set_adapters("a")
    assert torch.equal(output(model), output(fresh))

    model.delete_adapters("lora")
    assert torch.equal(output(model), output(fresh))
    model.set_adapters("a", 2.0)
    assert not torch.equal(output(model), output(fresh))


@ORDERS
def test_fused_and_unfused_beside_a_lora(order: str):
    model, _ = with_lora(order, **LINEAR)
    expected, before = output(model), base_state(model)
    model.fuse_lora()
    close(output(model), expected)
    model.unfuse_lora()
    after = base_state(model)
    for key in before:
        close(after[key], before[key])
    close(output(model), expected)


def test_a_lora_file_without_a_name_finds_its_own():
    model = by_peft()
    other = stock("sd15")
    other.add_adapter(lora(("to_q",)), adapter_name="x")
    model.load_lora_adapter(peft.get_peft_model_state_dict(other, adapter_name="x"), prefix=None)
    assert list(model.peft_config) == ["a", "default_1"]


@pytest.mark.parametrize("order", ["inject first", "peft first"])
def test_beside_inject_all_act_in_parallel(order: str):
    both = injected(adapters={"ours": 2, "a": 5})
    ours = copy.deepcopy(both)
    a3fta.eject(ours, "a")
    if order == "inject first":
        model = added(copy.deepcopy(ours), both)
        a3fta.set_trainable(model)
    else:
        model = added(stock("sd15"), both)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4), "ours", backend="reference")
        for name, projection in a3fta.projections(model).items():
            state = a3fta.projections(ours)[name].adapters["ours"].state_dict()
            projection.adapters["ours"].load_state_dict(state)
    assert list(a3fta.projections(model)) == list(a3fta.projections(ours))
    assert torch.equal(output(model), output(both))
    # sums over the ranks of both: as the one layer with both
    run(model, "sd15").square().sum().backward()
    run(both, "sd15").square().sum().backward()
    expected = {n: p.grad for n, p in both.named_parameters() if p.requires_grad}
    names = {
        n: n.replace(".base_layer", "").replace(".a3fta_adapters.", ".adapters.")
        for n in trains(model)
    }
    assert set(names.values()) == set(expected)
    for name, parameter in model.named_parameters():
        if name in names:
            torch.testing.assert_close(parameter.grad, expected[names[name]], rtol=1e-4, atol=1e-5)

    model.disable_adapters()
    assert torch.equal(output(model), output(ours))
    with a3fta.disabled(model):
        assert torch.equal(output(model), output(stock("sd15")))
    model.enable_adapters()
    with pytest.raises(ValueError, match="without PEFT's layers around them"):
        a3fta.merge(model)
    refused(model, "plain weights to merge|linear adapters", model.fuse_lora)
    a3fta.eject(model)
    assert torch.equal(output(model), output(by_peft(adapters={"a": 5})))


class Scaled(nn.Linear):
    """Stands for a quantized layer: the weight alone is not what it computes with."""

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.linear(h, 2 * self.weight, self.bias)


@pytest.mark.parametrize("kind", ["subclass", "hooks"])
def test_a_base_that_is_not_plain(kind: str):
    seen: list[Tensor] = []
    model = by_peft()
    plain = layers(model)["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"]
    base, adapter = plain.base_layer, plain.a3fta_adapters["a"]
    h = torch.randn(2, 5, plain.in_features)
    with torch.no_grad():
        a = nn.functional.gelu(h @ adapter.w_down.T + adapter.b_down)
        adapted = h + a @ adapter.w_up.T + adapter.b_up
        close(plain(h), base(adapted))
        assert plain.unfused_reason() is None
        if kind == "subclass":
            base.__class__ = Scaled
            assert "class Scaled" in str(plain.unfused_reason())
        else:
            base.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            assert "hooks" in str(plain.unfused_reason())
        close(plain(h), base(adapted))
        if kind == "hooks":
            close(seen[0], adapted)
    with pytest.raises(ValueError, match=r"plain weights|linear adapters"):
        plain.merge()


def test_our_processors_give_the_layer_the_residual():
    twin = injected("unet2d")
    model = peft.inject_adapter_in_model(A3FTAConfig(rank=4, **BACKEND), stock("unet2d"), "a")
    fill(model, twin)
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(a3fta.processors.A3FTAAttnProcessor())
    assert torch.equal(output(model, "unet2d"), output(twin, "unet2d"))
    layer = next(iter(layers(by_peft()).values()))
    h, residual = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)
    close(layer(h, residual=residual), layer(h) + residual)
    close(layer(h, residual=residual.double()).float(), layer(h) + residual)


def test_a_stock_state_dict_loads_beside_the_merged():
    model = by_peft(**LINEAR)
    model.fuse_lora()
    result = model.load_state_dict(models.build("sd15").state_dict(), strict=False)
    assert result.unexpected_keys and all("to_out.0." in key for key in result.unexpected_keys)


def test_the_layer_shows_what_it_is():
    model = by_peft()
    text = repr(next(iter(layers(model).values())))
    assert text.startswith("a3fta.A3FTALinear(") and "rank=4" in text


def test_beside_inject_when_frozen_for_inference_and_with_a_residual():
    """What `freeze_for_inference` keeps is of the injected adapters alone."""
    both = injected(adapters={"ours": 2, "a": 5})
    ours = copy.deepcopy(both)
    a3fta.eject(ours, "a")
    for layer in a3fta.projections(ours).values():
        layer.backend = "auto"
    model = added(ours, both)
    kept = a3fta.freeze_for_inference(model)
    assert kept == (len(layers(model)) if a3fta.backends()["native"].available else 0)
    close(output(model), output(both))
    name, layer = next(iter(layers(model).items()))
    h, residual = torch.randn(2, 3, layer.in_features), torch.randn(2, 3, layer.out_features)
    expected = both.get_submodule(name)(h) + residual
    close(layer(h, residual=residual), expected)
    close(layer(h, residual=residual.double()).float(), expected)
