"""set_adapters, enable, disable, what trains, and the frozen state, on whole models."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

import a3fta_kernels as a3fta
from a3fta_kernels import processors

from . import models
from .models import assert_unchanged, snapshot

# half of the layers; of Flux a dual block, and a single one
HALF = {"sd15": "attn1", "flux": r"blocks\.0\."}


def two_adapters(name):
    """Two trained adapters, "a" everywhere and "b" on half of the layers."""
    model = models.build(name)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4), name="a")
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, targets=HALF[name], scale=0.5), name="b")
    models.randomize(model, "a", seed=2)
    models.randomize(model, "b", seed=3)
    return model


@pytest.fixture
def model():
    return two_adapters("sd15")


def run(model):
    with torch.no_grad():
        return models.run(model, "sd15")


@pytest.mark.parametrize(("name", "count"), [("sd15", 4), ("flux", 3)])
def test_set_adapters_equals_the_formula_on_every_layer(name, count):
    model = two_adapters(name).double()
    seen = []

    def check(layer, args, kwargs, y):
        (h,) = args
        total = h.clone()
        start, length = layer.columns or (0, h.shape[-1])
        inside = h.narrow(-1, start, length)
        for name, weight in {"b": -0.3, "a": 0.7}.items():
            if name in layer.adapters:
                x = layer.adapters[name]
                z = F.gelu(F.linear(inside, x.w_down, x.b_down))
                change = weight * x.scale * F.linear(z, x.w_up, x.b_up)
                total.narrow(-1, start, length).add_(change)
        torch.testing.assert_close(y, F.linear(total, layer.weight, layer.bias))
        seen.append(list(layer.weights))

    a3fta.set_adapters(model, ["b", "a"], [-0.3, 0.7])
    for layer in a3fta.projections(model).values():
        layer.register_forward_hook(check, with_kwargs=True)
    with torch.no_grad():
        models.run(model, name, dtype=torch.float64)
    assert seen.count(["b", "a"]) == count and seen.count(["a"]) == count


def test_choosing_one_is_as_if_the_other_were_ejected(model):
    both = run(model)
    a3fta.set_adapters(model, "b")
    only_b = run(model)
    a3fta.set_adapters(model, "a", 0.5)
    half_a = run(model)
    a3fta.set_adapters(model, ["a"], 1)
    only_a = run(model)
    assert not any(torch.allclose(x, both) for x in (only_a, only_b, half_a))
    assert not torch.allclose(half_a, only_a)
    a3fta.eject(model, "b")
    assert torch.equal(run(model), only_a)


def test_no_adapter_is_the_stock_model(model):
    stock = run(models.build("sd15"))
    a3fta.set_adapters(model, [])
    assert torch.equal(run(model), stock)


def test_disable_enable_and_the_context(model):
    stock, both = run(models.build("sd15")), run(model)
    a3fta.disable_adapters(model)
    assert torch.equal(run(model), stock)
    with a3fta.disabled(model):
        assert torch.equal(run(model), stock)
    assert torch.equal(run(model), stock), "the block restores what was before it"
    a3fta.enable_adapters(model)
    assert torch.equal(run(model), both)
    with pytest.raises(KeyError), a3fta.disabled(model):
        assert torch.equal(run(model), stock)
        raise KeyError
    assert torch.equal(run(model), both)


@pytest.mark.parametrize(
    ("names", "weights", "error", "message"),
    [
        ("c", None, ValueError, r"names: expected adapters that the model has \(a, b\), got 'c'"),
        (["a", "c"], None, ValueError, "names: .* got 'c'"),
        (["a", "a"], None, ValueError, "names: expected each name once"),
        (3, None, TypeError, "names: expected a name or a list of names, got 3"),
        ([1], None, TypeError, "names: expected a name or a list"),
        ("a", [1.0, 2.0], ValueError, "weights: expected one for each of 1 names, got 2"),
        ("a", "1", TypeError, "weights: expected a number or a list of them, got '1'"),
        ("a", ["1"], TypeError, "weights: expected numbers, got '1'"),
        ("a", True, TypeError, "weights: expected numbers, got True"),
        (["a", "b"], [1.0, float("inf")], ValueError, "weights: expected finite numbers, got inf"),
    ],
)
def test_set_adapters_refuses(model, names, weights, error, message):
    before, output = snapshot(model), run(model)
    with pytest.raises(error, match=message):
        a3fta.set_adapters(model, names, weights)
    assert_unchanged(model, before)
    assert torch.equal(run(model), output)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: a3fta.set_adapters(m, "a"),
        a3fta.enable_adapters,
        a3fta.disable_adapters,
        lambda m: a3fta.disabled(m).__enter__(),
        a3fta.trainable_parameters,
        a3fta.set_trainable,
        a3fta.freeze_for_inference,
        a3fta.merge,
        a3fta.unmerge,
    ],
)
def test_a_stock_model_is_refused(call):
    model = models.build("sd15")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected a model with adapters.*inject first"):
        call(model)
    assert_unchanged(model, before)


class TestTrainable:
    def test_a_new_iterator_each_time(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (list(a3fta.trainable_parameters(model)) for _ in range(2))
        assert len(first) == (8 + 4) * 4 and first == second
        assert {id(p) for p in first} == {id(p) for p in model.parameters() if p.requires_grad}

    def test_set_trainable_picks(self, model):
        a3fta.set_trainable(model, "b")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = list(a3fta.trainable_parameters(model))
        assert len(found) == 4 * 4
        models.run(model, "sd15").square().mean().backward()
        for key, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (".adapters.b." in key), key
        a3fta.set_trainable(model)
        assert len(list(a3fta.trainable_parameters(model))) == (8 + 4) * 4

    def test_frozen_by_someone_else(self, model):
        model.requires_grad_(False)
        with pytest.warns(UserWarning, match="the adapters a, b are frozen.*set_trainable"):
            assert not list(a3fta.trainable_parameters(model))
        a3fta.set_trainable(model)
        assert len(list(a3fta.trainable_parameters(model))) == (8 + 4) * 4
        assert not any(
            p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n
        )

    def test_unknown_name(self, model):
        before = snapshot(model)
        with pytest.raises(ValueError, match="names: expected adapters that the model has"):
            a3fta.set_trainable(model, ["a", "z"])
        assert_unchanged(model, before)


class TestPEFT:
    """LoRA before, and after, on the same layers and on others: both act and both train."""

    TARGETS = ("to_q", "to_out.0", "to_add_out", "proj_out")

    def lora(self, model):
        peft = pytest.importorskip("peft")
        torch.manual_seed(5)
        model.add_adapter(
            peft.LoraConfig(r=2, target_modules=list(self.TARGETS), init_lora_weights=False)
        )

    @pytest.mark.parametrize("name", ["sd15", "flux"])
    @pytest.mark.parametrize("lora_first", [True, False])
    def test_both_train_and_eject_leaves_the_lora(self, lora_first, name):
        def run(model):
            with torch.no_grad():
                return models.run(model, name)

        model, alone = models.build(name), models.build(name)
        self.lora(alone)
        if lora_first:
            self.lora(model)
        a3fta.inject(model, a3fta.AdapterConfig(rank=4))
        if not lora_first:
            self.lora(model)
            with pytest.warns(UserWarning, match="set_trainable"):
                list(a3fta.trainable_parameters(model))
            a3fta.set_trainable(model)
        plain = models.build(name)
        sites = list(processors.family_of(plain).sites(plain))
        assert set(a3fta.projections(model)) == {n for site in sites for n in site.projections}
        assert torch.allclose(run(model), run(alone), atol=1e-5)
        models.randomize(model)
        assert not torch.allclose(run(model), run(alone), atol=1e-3)
        models.run(model, name).square().mean().backward()
        for key, parameter in model.named_parameters():
            expected = ".adapters." in key or ".lora_" in key
            assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == expected, key
        a3fta.eject(model)
        assert torch.equal(run(model), run(alone))
        assert list(model.state_dict()) == list(alone.state_dict())


class TestFreezeForInference:
    @pytest.fixture(autouse=True)
    def needs_native(self):
        if not a3fta.backends()["native"].available:
            pytest.skip(a3fta.backends()["native"].reason)

    def kept(self, model):
        return sum(layer.frozen is not None for layer in a3fta.projections(model).values())

    @pytest.mark.parametrize(("name", "count"), [("sd15", 8), ("flux", 6)])
    def test_same_output(self, name, count):
        model = two_adapters(name)
        with torch.no_grad():
            before = models.run(model, name)
            assert a3fta.freeze_for_inference(model) == self.kept(model) == count
            assert torch.equal(models.run(model, name), before)
            a3fta.unfreeze(model)
            assert self.kept(model) == 0 and torch.equal(models.run(model, name), before)

    @pytest.mark.parametrize(
        "thaw",
        [
            lambda m: m.train(),
            lambda m: m.load_state_dict(m.state_dict()),
            lambda m: a3fta.set_adapters(m, "a"),
            lambda m: a3fta.inject(m, a3fta.AdapterConfig(rank=4), name="c"),
            lambda m: a3fta.eject(m, "a"),
        ],
    )
    def test_thaws(self, model, thaw):
        a3fta.freeze_for_inference(model)
        thaw(model)
        assert self.kept(model) == 0

    def test_off_means_off(self, model):
        a3fta.freeze_for_inference(model)
        with a3fta.disabled(model):
            assert torch.equal(run(model), run(models.build("sd15")))


def test_eject_inside_disabled_leaves_the_stock_model():
    model = models.build("sd15")
    before = snapshot(model)
    a3fta.inject(model, a3fta.AdapterConfig(rank=2))
    with a3fta.disabled(model):
        a3fta.eject(model)
    assert_unchanged(model, before)


def test_frozen_in_inference_mode_serves_outside_it(model):
    with torch.inference_mode():
        expected = run(model)
        a3fta.freeze_for_inference(model)
    torch.testing.assert_close(run(model), expected)
    models.run(model, "sd15").sum().backward()


def test_an_adapter_that_joins_a_disabled_model_rests_too():
    model = models.build("sd15")
    expected = run(model)
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, targets="attn1"), name="a")
    a3fta.disable_adapters(model)
    a3fta.inject(model, a3fta.AdapterConfig(rank=2), name="b")
    models.randomize(model, "b")
    torch.testing.assert_close(run(model), expected)
    a3fta.enable_adapters(model)
    assert not torch.allclose(run(model), expected)


def test_names_from_a_generator_count_and_a_dict_is_refused(model):
    a3fta.set_adapters(model, (n for n in ["a"]), [0.5])
    assert next(iter(a3fta.projections(model).values())).weights == {"a": 0.5}
    with pytest.raises(TypeError, match="names: expected a name or a list of names"):
        a3fta.set_adapters(model, {"a": 0.5})


def test_a_layer_in_training_does_not_use_what_is_frozen(model):
    model.train()
    a3fta.freeze_for_inference(model)
    before = run(model)
    for parameter in a3fta.trainable_parameters(model):
        parameter.data.mul_(2)
    assert not torch.allclose(run(model), before)
