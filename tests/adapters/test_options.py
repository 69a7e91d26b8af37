"""What a config adds to any design: a norm in front, samples and timesteps without the adapter."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import DESIGNS, AdapterConfig, timestep
from a3fta_kernels.conversion import adapt
from a3fta_kernels.ops.activations import activate

from .. import models
from ..adapter_files import load, refused

BACKENDS = [
    name
    for name in ("reference", "native")
    if name == "reference" or a3fta.backends()[name].available
]
backends = pytest.mark.parametrize("backend", BACKENDS)


def layer_with(backend="reference", dtype=torch.float64, columns=None, **options):
    torch.manual_seed(0)
    layer = adapt(nn.Linear(16, 24, dtype=dtype).requires_grad_(False), backend, columns)
    add(layer, "a", dtype, **options)
    return layer


def add(layer, name, dtype=torch.float64, weight=1.0, **options):
    config = AdapterConfig(**{"rank": 4} | options)
    width = 16 if layer.columns is None else layer.columns[1]
    adapter = DESIGNS[config.design](width, config.rank, config, dtype=dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    layer.adapters[name] = adapter.train(layer.training)
    layer.choose(layer.weights | {name: weight})


def formula(layer, h, keep=1.0):
    """keep: what z of the last adapter is multiplied by, or 1."""
    start, length = layer.columns or (0, h.shape[-1])
    inside = total = h[..., start : start + length]
    for name, weight in layer.weights.items():
        x = layer.adapters[name]
        normed = inside
        if x.config.layer_norm:
            mean, var = inside.mean(-1, True), inside.var(-1, unbiased=False, keepdim=True)
            normed = (inside - mean) / (var + 1e-5).sqrt()
        z = activate(F.linear(normed, x.w_down, x.b_down), x.activation)
        z = z * keep if name == list(layer.weights)[-1] else z
        total = total + weight * x.scale * F.linear(z, x.w_up, x.b_up)
    total = torch.cat((h[..., :start], total, h[..., start + length :]), dim=-1)
    return F.linear(total, layer.weight, layer.bias)


def assert_follows(layer, h, keep=1.0, seed=None):
    wanted = [h, *layer.adapters.parameters()]
    dy = torch.randn(*h.shape[:-1], 24, dtype=h.dtype)
    expected = formula(layer, h, keep)
    gradients = torch.autograd.grad(expected, wanted, dy)
    if seed is not None:
        torch.manual_seed(seed)
    y = layer(h)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, wanted, dy), gradients, strict=True):
        torch.testing.assert_close(got, want)


def rows(samples=2, dtype=torch.float64):
    return torch.randn(samples, 5, 16, dtype=dtype, requires_grad=True)


@backends
@pytest.mark.parametrize("columns", [None, (3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(backend, columns, bias):
    layer = layer_with(backend, columns=columns, bias=bias, layer_norm=True, scale=0.7)
    assert layer.unfused_reason() == "its adapter reads attention normalised"
    assert not layer.freeze()
    assert_follows(layer, rows())
    residual = torch.randn(2, 5, 24, dtype=torch.float64)
    h = rows()
    torch.testing.assert_close(layer(h, residual=residual), formula(layer, h) + residual)


@backends
def test_with_and_without_a_norm_side_by_side(backend):
    layer = layer_with(backend, layer_norm=True)
    add(layer, "b", weight=0.3)
    assert_follows(layer, rows())
    layer.choose({"b": 0.3, "a": 1.0})
    assert_follows(layer, rows())


@backends
def test_drop_path_leaves_out_whole_samples(backend):
    layer = layer_with(backend, drop_path=0.5).train()
    assert layer.adapters["a"].b_up is None and layer.adapters["a"].b_down is not None
    h = rows(samples=8)
    torch.manual_seed(3)
    keep = layer.adapters["a"].kept(8, h.device)
    assert set(keep.unique().tolist()) == {0.0, 2.0} and (keep == keep[:, :1]).all()
    assert_follows(layer, h, keep[:, None].double(), seed=3)
    torch.manual_seed(3)
    out = keep[:, 0] == 0
    torch.testing.assert_close(layer(h)[out], F.linear(h, layer.weight, layer.bias)[out])
    layer.eval()
    assert_follows(layer, h)


def test_drop_path_and_dropout_multiply():
    adapter = layer_with(drop_path=0.5, dropout=0.2, rank=64).adapters["a"].train()
    torch.manual_seed(0)
    keep = adapter.kept(4000, torch.device("cpu"))
    assert {round(x, 4) for x in keep.unique().tolist()} == {0.0, 2.5}
    assert keep.mean().item() == pytest.approx(1, abs=0.05)
    assert (keep.sum(1) == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


@backends
@pytest.mark.parametrize("design", DESIGNS)
def test_outside_its_window_nothing_is_left_of_it(backend, design):
    layer = layer_with(backend, design=design, time_window=(100, 500))
    alike = layer_with(backend, design=design, time_window=(0, 1000))
    h = rows(samples=4)
    t = torch.tensor([99.0, 100.0, 500.0, 501.0])
    with timestep.at(timestep.moment_of(t)):
        y, inside = layer(h), alike(h)
    stock = F.linear(h, layer.weight, layer.bias)
    torch.testing.assert_close(y[[0, 3]], stock[[0, 3]])
    torch.testing.assert_close(y[[1, 2]], inside[[1, 2]])
    assert not torch.allclose(inside, stock, atol=0.1)


@backends
def test_the_rank_shrinks_with_the_timestep(backend):
    layer = layer_with(backend, rank=10, time_rank=3)
    t = torch.tensor([0.0, 250.0, 999.0, 1000.0])
    counts = [math.floor((10 - 3) * (1000 - x) / 1000) + 3 for x in t.tolist()]
    assert counts == [10, 8, 3, 3]
    keep = torch.tensor([[1.0] * n + [0.0] * (10 - n) for n in counts], dtype=torch.float64)
    with timestep.at(timestep.moment_of(t)):
        assert_follows(layer, rows(samples=4), keep[:, None])
        layer.adapters["a"].config = AdapterConfig(rank=10, time_rank=3, time_window=(900, 1000))
        inside = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]
        assert_follows(layer, rows(samples=4), (keep * inside)[:, None])


@pytest.mark.parametrize("option", ["layer_norm", "drop_path", "time_window", "time_rank"])
def test_in_a_model(option, tmp_path):
    value = {"layer_norm": True, "drop_path": 0.5, "time_window": (0, 500), "time_rank": 1}[option]
    config = AdapterConfig(rank=4, **{option: value})
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = models.build("sd15")
    with torch.no_grad():
        stock = models.run(model, "sd15")
        report = a3fta.inject(model, config, backend="reference")
        assert torch.equal(models.run(model, "sd15"), stock)
        models.randomize(model, std=0.3)
        y = models.run(model, "sd15")
        assert not torch.allclose(y, stock, atol=1e-3)
    assert ("attention normalised" in str(report)) == (option == "layer_norm")
    a3fta.save_adapter(model, tmp_path)
    other = models.build("sd15")
    assert load(other, tmp_path) == config
    with torch.no_grad():
        torch.testing.assert_close(models.run(other, "sd15"), y, rtol=1e-4, atol=1e-5)
    plain = models.build("sd15")
    a3fta.inject(plain, AdapterConfig(rank=4))
    refused(plain, tmp_path, "b_up|" + option)
    model.train()
    models.run(model, "sd15").square().mean().backward()
    assert all(p.grad is not None for p in a3fta.trainable_parameters(model))
    a3fta.eject(model)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_norm": True}, "read h as it is to .*layer_norm=True"),
        ({"time_window": (0, 500)}, "the same at all timesteps"),
        ({"time_rank": 1}, "the same at all timesteps"),
    ],
)
def test_what_is_no_single_matrix(options, message, tmp_path):
    model = models.build("sd15")
    a3fta.inject(model, AdapterConfig(rank=2, activation="identity", bias=False, **options))
    for make in (a3fta.merge, lambda m: a3fta.export_lora(m, tmp_path)):
        with pytest.raises(ValueError, match=message):
            make(model)


def test_merging_with_an_inner_shift_alone():
    """drop_path has b_down without b_up; in training it is refused as dropout is."""
    model = models.build("sd15", dtype=torch.float64)
    a3fta.inject(model, AdapterConfig(rank=2, activation="identity", drop_path=0.5))
    models.randomize(model, std=0.3)
    with torch.no_grad():
        expected = models.run(model, "sd15", dtype=torch.float64)
        with pytest.raises(ValueError, match=r"drop_path=0\.5"):
            a3fta.merge(model.train())
        a3fta.merge(model.eval())
        found = models.run(model, "sd15", dtype=torch.float64)
    torch.testing.assert_close(found, expected)


@backends
def test_fullgraph_compile(backend):
    torch._dynamo.reset()
    layer = layer_with(backend, torch.float32, layer_norm=True)
    add(layer, "b", torch.float32, time_window=(0, 500), time_rank=2)
    h = rows(dtype=torch.float32)
    with timestep.at(timestep.moment_of(torch.tensor([10, 700]))):
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(h)
        torch.testing.assert_close(y, layer(h), rtol=1e-4, atol=1e-4)
