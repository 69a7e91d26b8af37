"""Adapters in front of the projection, behind it and beside attention: formulas, files, merges,
switches, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels import placements as placements_module
from a3fta_kernels import planning
from a3fta_kernels.adapters import AdapterConfig, timestep
from a3fta_kernels.adapters.config import PLACEMENTS
from a3fta_kernels.ops.activations import activate
from a3fta_kernels.placements import input_of
from a3fta_kernels.processors import FAMILIES

from . import models
from .adapter_files import load, refused
from .models.zoo import ZOO
from .placed import LATE, Net, adapted, late, net, net_with

# one model of every family
FIRST = list({small.family: name for name, small in reversed(ZOO.items())}.values())
BACKENDS = [
    name
    for name in ("reference", "native")
    if name == "reference" or a3fta.backends()[name].available
]


def adapter_of(x: Any, h: Tensor) -> Tensor:
    """The adapter's own output, by the formulas of the designs in use here."""
    if x.config.layer_norm:
        h = F.layer_norm(h, h.shape[-1:])
    z = activate(F.linear(h, x.w_down, x.b_down), x.activation)
    if x.config.design == "film":
        both = timestep.now().embedding.to(x.w_time) @ x.w_time.T
        gamma, beta = (part[:, None] for part in both.split(x.rank, dim=1))
        z = z * (1 + gamma) + beta
    factor = x.s if x.config.design == "scaled" else 1
    return x.scale * factor * F.linear(z, x.w_up, x.b_up)


def formula(model: Net, h: Tensor, x: Tensor) -> Tensor:
    """The projection's output for attention's output h and input x."""
    layer = model.attention.to_out[0]
    found = {name: (layer.adapters[name], weight) for name, weight in layer.weights.items()}
    for a, weight in (found[n] for n in found if n == "pre"):
        h = h + weight * adapter_of(a, h)
    y = total = F.linear(h, layer.weight, layer.bias)
    for name, source in (("post", y), ("parallel", x)):
        if name in found:
            total = total + found[name][1] * adapter_of(found[name][0], source)
    return total


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        (backend, options)
        for backend in BACKENDS
        for options in (
            {},
            {"bias": False},
            {"layer_norm": True},
            {"design": "scaled"},
            {"design": "film"},
        )
    ],
    ids=str,
)
@pytest.mark.parametrize("placements", [("post",), ("parallel",), PLACEMENTS], ids="+".join)
def test_formula_and_every_gradient(placements, options, backend):
    model = net_with(*placements, backend=backend, **options)
    layer, seen = model.attention.to_out[0], []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    moment = timestep.moment_of(torch.tensor([10.0, 700.0]))
    with timestep.at(moment):
        y = model.attention(x)
        expected = formula(model, seen[0], x)
        torch.testing.assert_close(y, expected)
        wanted = [x, *layer.adapters.parameters()]
        dy = torch.randn_like(y)
        found = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        for got, want in zip(found, torch.autograd.grad(expected, wanted, dy), strict=True):
            assert want.any()
            torch.testing.assert_close(got, want)
        residual = torch.randn_like(y)
        if "parallel" in placements:
            layer.source = x
        torch.testing.assert_close(layer(seen[0], residual=residual), expected + residual)
    assert layer.source is None


def test_beside_attention_it_is_one_op(monkeypatch):
    """What the projection gives is its base, and no product is left to PyTorch."""
    asked = []

    def adapter(*args, base, **options):
        asked.append((base.shape, options["backend"]))
        return plain(*args, base=base, **options)

    plain = placements_module.ops.adapter
    monkeypatch.setattr(placements_module.ops, "adapter", adapter)
    monkeypatch.setattr(placements_module, "delta", None)
    model = net_with("parallel", backend="reference")
    model.attention(torch.randn(2, 5, 16, dtype=torch.float64))
    assert asked == [((2, 5, 24), "reference")]


@pytest.mark.parametrize(("placement", "shapes"), [
    ("pre", ((3, 24), (24, 3))), ("post", ((3, 24), (24, 3))), ("parallel", ((3, 16), (24, 3))),
])  # fmt: skip
def test_widths(placement, shapes):
    adapter = net_with(placement).attention.to_out[0].adapters[placement]
    assert (adapter.w_down.shape, adapter.w_up.shape) == shapes
    assert adapter.b_up.shape == (24,)


@late
def test_why_it_is_apart(placement):
    model = net()
    report = a3fta.inject(model, AdapterConfig(rank=3, placement=placement))
    found = report.layers["attention.to_out.0"]
    reads = {"post": "what the projection gives", "parallel": "what attention is given"}
    assert not found.fused and found.why_not_fused == f"its adapter reads {reads[placement]}"
    assert found.channels == {"post": 24, "parallel": 16}[placement]
    assert a3fta.freeze_for_inference(model) == 0


@pytest.mark.parametrize("name", FIRST)
def test_every_family_starts_as_it_is_and_trains_all(name):
    """Behind and beside at once, in every model whose attention allows both."""
    small = ZOO[name]
    joins = FAMILIES[small.family].joins
    model = small.build()
    with torch.no_grad():
        torch.manual_seed(0)
        stock = small.run(model)
    a3fta.inject(model, AdapterConfig(rank=2, placement="post"), name="post")
    beside = AdapterConfig(rank=2, placement="parallel")
    if joins:
        with pytest.raises(ValueError, match=f"placement: .* got {small.family}, which joins text"):
            a3fta.inject(model, beside, name="parallel")
    else:
        a3fta.inject(model, beside, name="parallel")
        a3fta.set_adapters(model, ["post", "parallel"])
    torch.manual_seed(0)
    y = small.run(model)
    torch.testing.assert_close(y, stock, rtol=1e-4, atol=1e-5)
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        layer = key.partition(".adapters.")[0]
        if key.endswith("w_up") and not any(re.fullmatch(p, layer) for p in small.idle):
            assert parameter.grad is not None and parameter.grad.any(), key
    assert all(layer.source is None for layer in a3fta.projections(model).values())


def test_a_family_joins_where_an_adapter_beside_it_has_no_input(monkeypatch):
    """The rows that say so, and no others: without the word the forward itself refuses."""
    for small in ZOO.values():
        if FAMILIES[small.family].joins:
            row = dataclasses.replace(FAMILIES[small.family], joins=False)
            monkeypatch.setattr(planning.processors, "family_of", lambda _, row=row: row)
            model = small.build()
            a3fta.inject(model, AdapterConfig(rank=2, placement="parallel"))
            with pytest.raises(RuntimeError, match="hands over as many rows"), torch.no_grad():
                small.run(model)


# -- switches, files, merges -----------------------------------------------------------------


@late
def test_eject_leaves_no_trace(placement):
    model = models.build("sd15")
    before = models.snapshot(model)
    a3fta.inject(model, AdapterConfig(rank=2, placement=placement), name="a")
    a3fta.inject(model, AdapterConfig(rank=2, placement=placement), name="b")
    a3fta.inject(model, AdapterConfig(rank=2), name="c")
    a3fta.set_adapters(model, ["a", "b", "c"])
    models.run(model, "sd15")
    a3fta.eject(model, "a")
    models.run(model, "sd15")  # the other one still gets its input
    a3fta.eject(model, "b")
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_pre_hooks_with_kwargs for m in model.modules())
    models.run(model, "sd15")
    a3fta.eject(model)
    models.assert_unchanged(model, before)


@late
def test_switched_off_it_holds_nothing(placement):
    model = net_with(placement)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with a3fta.disabled(model):
        assert torch.equal(model(x), net()(x))
        assert model.attention.to_out[0].source is None
    assert not torch.allclose(model(x), net()(x))


@pytest.mark.parametrize("name", ["sd15", "flux"])
@late
def test_files(name, placement, tmp_path):
    config = AdapterConfig(rank=4, placement=placement)
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = adapted(name, placement).eval()
    a3fta.save_adapter(model, tmp_path)
    other = models.build(name)
    assert load(other, tmp_path) == config
    with torch.no_grad():
        expected = models.run(model, name)
        torch.testing.assert_close(models.run(other, name), expected, rtol=1e-4, atol=1e-5)
    models.randomize(other, seed=5)
    load(other, tmp_path)  # into the adapter that is there
    with torch.no_grad():
        torch.testing.assert_close(models.run(other, name), expected, rtol=1e-4, atol=1e-5)
    plain = models.build(name)
    a3fta.inject(plain, AdapterConfig(rank=4))
    refused(plain, tmp_path, "placement='pre', as the adapter 'default'")


def test_a_config_from_before_there_were_placements():
    values = AdapterConfig().to_dict()
    del values["placement"]
    assert AdapterConfig.from_dict(values).placement == "pre"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("placements", [("post",), ("pre", "post")], ids="+".join)
def test_merging_behind_the_projection(placements, bias):
    model = net_with(*placements, activation="identity", bias=bias)
    stock = copy.deepcopy(model.attention.to_out[0].state_dict())
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        a3fta.merge(model)
        torch.testing.assert_close(model(x), expected)
        a3fta.unmerge(model)
    for key, tensor in model.attention.to_out[0].state_dict().items():
        assert torch.equal(tensor, stock[key])


def test_merging_behind_a_projection_without_a_bias():
    for bias in (True, False):
        model = net()
        model.attention.to_out[0] = nn.Linear(24, 24, bias=False, dtype=torch.float64)
        config = AdapterConfig(rank=3, placement="post", activation="identity", bias=bias)
        a3fta.inject(model, config)
        models.randomize(model)
        x = torch.randn(2, 5, 16, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            a3fta.merge(model)
            torch.testing.assert_close(model(x), expected)
        assert (model.attention.to_out[0].bias is None) == (not bias)


def test_what_is_refused(tmp_path):
    beside = adapted("sd15", "parallel", activation="identity", bias=False)
    with pytest.raises(ValueError, match="adapter 'default' with placement='parallel' at down_"):
        a3fta.merge(beside)
    for placement in LATE:
        model = adapted("sd15", placement, activation="identity", bias=False)
        with pytest.raises(ValueError, match=f"in front .* placement='{placement}' at down_"):
            a3fta.export_lora(model, tmp_path)
    with pytest.raises(ValueError, match=r"placement: expected .*pre.*got 'behind'"):
        AdapterConfig(placement="behind")


def test_a_copy_after_a_forward_that_was_cut_off():
    model = net_with("parallel")
    model.attention.to_v.register_forward_pre_hook(lambda *_: 1 / 0)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ZeroDivisionError):
        model(2 * x)
    assert copy.deepcopy(model).attention.to_out[0].source is None


def test_a_projection_alone_has_no_input():
    layer = net_with("parallel").attention.to_out[0]
    with pytest.raises(RuntimeError, match="placement: expected a forward of the attention layer"):
        layer(torch.randn(2, 5, 24, dtype=torch.float64))


def test_attention_of_which_nothing_tells_what_it_reads():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj, self.out_proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out_proj(self.in_proj(x).chunk(3, dim=-1)[0])

    model = nn.Sequential(Packed())
    before = models.snapshot(model)
    assert input_of(model[0], "out_proj") is None
    with pytest.raises(ValueError, match=r"placement: .* got a Packed at 0\.out_proj"):
        a3fta.inject(model, AdapterConfig(rank=2, placement="parallel"))
    models.assert_unchanged(model, before)


@late
def test_inside_a_lora(placement):
    peft = pytest.importorskip("peft")
    model = adapted("sd15", placement).eval()
    with torch.no_grad():
        expected = models.run(model, "sd15")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    with torch.no_grad():
        found = wrapped(**models.inputs("sd15")).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    again = models.build("sd15")
    wrapped = peft.get_peft_model(again, peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    a3fta.inject(wrapped, AdapterConfig(rank=4, placement=placement))
    models.randomize(again, std=0.3)
    with torch.no_grad():
        found = wrapped(**models.inputs("sd15")).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@late
def test_timed(placement):
    model = adapted("sd15", placement, design="film").eval()
    model.time_proj.forward = lambda t: torch.zeros(2, 32)
    with torch.no_grad():
        early, later = (model(**models.inputs("sd15") | {"timestep": t}).sample for t in (20, 600))
    assert not torch.allclose(early, later, atol=1e-3)


def test_what_a_forward_that_raised_left_goes_with_the_next():
    model = net_with("parallel")
    layer = model.attention.to_out[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def refuse(*_):
        raise RuntimeError("in between")

    hook = model.attention.to_v.register_forward_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="in between"):
        model(x)
    hook.remove()
    assert layer.source is not None
    with a3fta.disabled(model):
        model(x)
    assert layer.source is None
