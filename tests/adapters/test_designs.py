"""Every design of DESIGNS: its formula and gradients, and all that knows adapters by name."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import DESIGNS, AdapterConfig, BottleneckAdapter, timestep
from a3fta_kernels.conversion import adapt
from a3fta_kernels.memory.saved import record
from a3fta_kernels.ops.activations import activate

from .. import models
from ..adapter_files import load, refused

BACKENDS = [
    name
    for name in ("reference", "native")
    if name == "reference" or a3fta.backends()[name].available
]
native = pytest.mark.skipif("native" not in BACKENDS, reason="the library is not built")
# design -> what its up-projection is multiplied by, (1,) or (C,)
FACTORS = {
    "bottleneck": lambda adapter: torch.ones(1).to(adapter.w_up),
    "gated": lambda adapter: torch.tanh(adapter.gate),
    "half_open": lambda adapter: torch.sigmoid(adapter.gate),
    "scaled": lambda adapter: adapter.s,
    "rescaled": lambda adapter: adapter.s,
    "film": lambda adapter: torch.ones(1).to(adapter.w_up),
    "time_scaled": lambda adapter: torch.ones(1).to(adapter.w_up),
}
# design -> what z is multiplied by and what is added to it, for an embedding of timesteps
TIMED = {
    "film": lambda x, e: (1 + e @ x.w_time[: x.rank].T, e @ x.w_time[x.rank :].T),
    "time_scaled": lambda x, e: (1 + e @ x.w_time[0][:, None], 0),
}
# design -> parameters beside the bottleneck's, for C = 16 and R = 3
EXTRA = {
    "bottleneck": {},
    "gated": {"gate": (1,)},
    "half_open": {"gate": (1,)},
    "scaled": {"s": (16,)},
    "rescaled": {"s": (1,)},
    "film": {"w_time": (6, 64)},
    "time_scaled": {"w_time": (1, 64)},
}
# design -> what has a gradient at the start
FIRST = {key: {"w_up", "b_up"} for key in EXTRA} | {"gated": {"gate"}}
every_design = pytest.mark.parametrize("design", DESIGNS)


def test_the_tables_are_whole():
    assert set(DESIGNS) == set(FACTORS) == set(EXTRA) == set(FIRST)
    assert set(TIMED) == {name for name, design in DESIGNS.items() if design.timed}


@pytest.fixture(autouse=True)
def two_timesteps():
    """For layers that are called alone, with two samples."""
    with timestep.at(timestep.moment_of(torch.tensor([10, 700]))):
        yield


def layer_with(design, backend="reference", dtype=torch.float64, columns=None, **options):
    """An adapted layer, 16 to 24, whose adapter has weights as if trained."""
    torch.manual_seed(0)
    layer = adapt(nn.Linear(16, 24, dtype=dtype).requires_grad_(False), backend, columns)
    add(layer, design, dtype=dtype, **options)
    return layer


def add(layer, design, name="a", weight=1.0, dtype=torch.float64, **options):
    config = AdapterConfig(**{"rank": 4, "design": design} | options)
    width = 16 if layer.columns is None else layer.columns[1]
    adapter = DESIGNS[design](width, config.rank, config, dtype=dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    layer.adapters[name] = adapter.train(layer.training)
    layer.choose(layer.weights | {name: weight})
    return adapter


def formula(layer, h, masks=None):
    """h' @ weight.T + bias, with the factor outside the up-projection as the docstrings have it."""
    start, length = layer.columns or (0, h.shape[-1])
    inside = total = h[..., start : start + length]
    for name, weight in layer.weights.items():
        x = layer.adapters[name]
        z = activate(F.linear(inside, x.w_down, x.b_down), x.activation)
        if x.config.design in TIMED:
            factor, shift = (
                y[:, None] if isinstance(y, torch.Tensor) else y
                for y in TIMED[x.config.design](x, timestep.now().embedding.to(x.w_time))
            )
            z = z * factor + shift
        if masks is not None:
            z = z * (1 + masks[name])[:, None].to(z.dtype)
        up = F.linear(z, x.w_up, x.b_up)
        total = total + weight * x.scale * FACTORS[x.config.design](x) * up
    total = torch.cat((h[..., :start], total, h[..., start + length :]), dim=-1)
    return F.linear(total, layer.weight, layer.bias)


def assert_follows(layer, h, masks=None, seed=None):
    dy = torch.randn(*h.shape[:-1], 24, dtype=h.dtype)
    wanted = {"h": h, **dict(layer.adapters.named_parameters())}
    expected = formula(layer, h, masks)
    gradients = torch.autograd.grad(expected, list(wanted.values()), dy)
    if seed is not None:
        torch.manual_seed(seed)
    y = layer(h)
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y, list(wanted.values()), dy)
    for name, got, want in zip(wanted, found, gradients, strict=True):
        assert want.abs().max() > 0, name
        torch.testing.assert_close(got, want, msg=lambda m, n=name: f"{n}: {m}")


@every_design
@pytest.mark.parametrize("bias", [True, False])
def test_modules(design, bias, device):
    config = AdapterConfig(rank=3, bias=bias, design=design)
    module = DESIGNS[design](16, 3, config, device=device, dtype=torch.bfloat16)
    assert isinstance(module, BottleneckAdapter)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in module.parameters()} == {device.type}
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    biases = {"b_down": (3,), "b_up": (16,)} if bias else {}
    assert shapes == {"w_down": (3, 16), "w_up": (16, 3)} | biases | EXTRA[design]
    w_down, w_up, b_down, b_up, *modulation = module()
    assert modulation == [None, None]
    assert w_up.abs().sum() == 0 and w_down.abs().sum() > 0
    assert (b_down is not None) == (b_up is not None) == bias
    assert b_up is None or b_up.abs().sum() == 0
    assert {t.dtype for t in module() if t is not None} == {torch.bfloat16}
    for x in module(torch.randn(2, 5, 16, device=device))[4:]:
        assert x is None or (x.shape == (2, 3) and not x.any())


def test_the_gate_starts_closed_before_a_usual_layer():
    module = DESIGNS["gated"](64, 16, AdapterConfig(rank=16, design="gated"))
    assert module.gate.item() == 0
    assert 0.2 < module.w_up.abs().max() <= 0.25  # 1 / sqrt(R)


@every_design
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [None, (3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_formula_and_every_gradient(design, backend, columns, bias):
    layer = layer_with(design, backend, columns=columns, bias=bias, scale=0.7)
    assert_follows(layer, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activations", [("gelu",), ("gelu", "silu")])
@pytest.mark.parametrize("bias", [True, False])
def test_designs_side_by_side(backend, activations, bias):
    layer = layer_with("bottleneck", backend, weight=0.8)
    for i, (design, activation) in enumerate(itertools.product(DESIGNS, activations)):
        add(layer, design, f"b{i}", 0.3 + i, rank=2 + i, activation=activation, bias=bias)
    assert_follows(layer, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))


@every_design
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout(design, backend):
    layer = layer_with(design, backend, dropout=0.5, rank=16).train()
    h = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    masks = {"a": layer.adapters["a"].kept(2, h.device) - 1}
    assert set(masks["a"].unique().tolist()) == {-1.0, 1.0}
    assert_follows(layer, h, masks, seed=3)


@every_design
def test_gradcheck(design):
    layer = layer_with(design, BACKENDS[-1])
    wanted = list(layer.adapters.parameters())
    h = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (h, *wanted))


@every_design
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_are_never_narrowed_and_serve_half_precision(design, dtype):
    layer = layer_with(design, "auto", torch.float32).to(dtype)
    adapter = layer.adapters["a"]
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    h = torch.randn(2, 5, 16, dtype=dtype)
    y = layer(h)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters())
    exact = formula(copy.deepcopy(layer).double(), h.double())
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()
    assert {p.dtype for p in layer.double().adapters.parameters()} == {torch.float64}


@every_design
def test_fullgraph_compile(design):
    torch._dynamo.reset()
    layer = layer_with(design, BACKENDS[-1], torch.float32)
    h = torch.randn(2, 5, 16)
    y, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(h), layer(h)
    torch.testing.assert_close(y, expected)
    wanted = list(layer.adapters.parameters())
    got = torch.autograd.grad(y.square().sum(), wanted)
    want = torch.autograd.grad(expected.square().sum(), wanted)
    for x, z in zip(got, want, strict=True):
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-4)


@native
@every_design
def test_frozen_for_inference(design):
    layer = layer_with(design, "native", torch.float32).eval()
    h = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = layer(h)
        assert layer.freeze() and layer.frozen is not None
        assert torch.equal(layer(h), expected)
        torch.testing.assert_close(expected, formula(layer, h))


# -- in a model ------------------------------------------------------------------------------


def injected(design, train=False, backend="reference", dtype=torch.float32, **options):
    model = models.build("sd15", dtype=dtype)
    config = AdapterConfig(**{"rank": 4, "design": design} | options)
    report = a3fta.inject(model, config, backend=backend)
    if not train:
        models.randomize(model, std=0.3)
    return model.train(train), report


def output(model, dtype=torch.float32):
    with torch.no_grad():
        return models.run(model, "sd15", dtype=dtype)


@every_design
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_untrained_equals_stock_bit_for_bit(design, name, device):
    model = models.build(name, device=device)
    with torch.no_grad():
        expected = models.run(model, name, device=device)
        a3fta.inject(model, AdapterConfig(rank=4, design=design), backend="reference")
        assert torch.equal(models.run(model, name, device=device), expected)
        models.randomize(model, std=0.3)
        assert not torch.allclose(models.run(model, name, device=device), expected, atol=1e-4)


@every_design
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_starts_and_reaches_every_parameter(design, backend):
    model, report = injected(design, train=True, backend=backend)
    wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in name for name in wanted)
    assert list(map(id, wanted.values())) == list(map(id, a3fta.trainable_parameters(model)))
    assert report.parameters_added == sum(p.numel() for p in wanted.values())
    assert report.parameters_total == sum(p.numel() for p in models.build("sd15").parameters())
    optimizer = torch.optim.SGD(wanted.values(), lr=0.5)
    models.run(model, "sd15").square().mean().backward()
    for name, parameter in wanted.items():
        assert parameter.grad.any() == (name.rsplit(".", 1)[1] in FIRST[design]), name
    optimizer.step()
    optimizer.zero_grad()
    models.run(model, "sd15").square().mean().backward()
    assert all(parameter.grad.any() for parameter in wanted.values())


@pytest.mark.parametrize("design", [name for name in DESIGNS if name not in TIMED])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_and_unmerge(design, bias):
    options = dict(activation="identity", scale=0.7, bias=bias, dtype=torch.float64)
    model, _ = injected(design, **options)
    model.double()
    a3fta.inject(model, AdapterConfig(rank=2, activation="identity"), name="second")
    models.randomize(model, "second", seed=4)
    a3fta.set_adapters(model, ["default", "second"], [1.5, -0.5])
    before, expected = models.snapshot(model), output(model, torch.float64)
    a3fta.merge(model)
    weights = [(x.weight, x.merged.weight) for x in a3fta.projections(model).values()]
    assert not any(torch.equal(now, then) for now, then in weights)
    assert torch.allclose(output(model, torch.float64), expected, atol=1e-10)
    a3fta.unmerge(model)
    models.assert_unchanged(model, before)
    assert torch.equal(output(model, torch.float64), expected)


@pytest.mark.parametrize("design", TIMED)
def test_a_timed_one_is_no_single_matrix(design, tmp_path):
    model, _ = injected(design, activation="identity", bias=False)
    before = models.snapshot(model)
    message = rf"the same at all timesteps .* with design='{design}' at "
    with pytest.raises(ValueError, match=message):
        a3fta.merge(model)
    with pytest.raises(ValueError, match=message):
        a3fta.export_lora(model, tmp_path)
    models.assert_unchanged(model, before)


@every_design
def test_its_file_comes_back(design, tmp_path):
    model, _ = injected(design, dropout=0.25)
    a3fta.save_adapter(model, tmp_path)
    other = models.build("sd15")
    config = load(other, tmp_path)
    assert config == AdapterConfig(rank=4, design=design, dropout=0.25)
    assert torch.equal(output(other), output(model))
    for layer in a3fta.projections(other).values():
        assert type(layer.adapters["default"]) is DESIGNS[design]
    models.randomize(other, seed=9)
    load(other, tmp_path)  # into the adapter that is there
    assert torch.equal(output(other), output(model))


@pytest.mark.parametrize(("stored", "here"), list(itertools.pairwise([*DESIGNS, "bottleneck"])))
def test_a_file_of_another_design_is_refused(stored, here, tmp_path):
    a3fta.save_adapter(injected(stored)[0], tmp_path)
    message = f"design='{here}', as the adapter 'default' on .* has, found design='{stored}'"
    refused(injected(here)[0], tmp_path, message)


@every_design
def test_copies_and_pickles(design):
    model, _ = injected(design)
    expected = output(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in (*copies, torch.load(file, weights_only=False)):
        assert torch.equal(output(twin), expected)
        a3fta.eject(twin)
        assert torch.equal(output(twin), output(models.build("sd15")))
    assert torch.equal(output(model), expected)


def test_switching_between_designs():
    model = models.build("sd15")
    stock, alone = output(model), {}
    for design in DESIGNS:
        a3fta.inject(model, AdapterConfig(rank=4, design=design), name=design, backend="reference")
        models.randomize(model, design, std=0.3)
    for design in DESIGNS:
        a3fta.set_adapters(model, design)
        single = models.build("sd15")
        single_config = AdapterConfig(rank=4, design=design)
        a3fta.inject(single, single_config, name=design, backend="reference")
        models.randomize(single, design, std=0.3)
        alone[design] = output(model)
        assert torch.equal(alone[design], output(single))
    a3fta.set_adapters(model, list(DESIGNS), [float(design == "gated") for design in DESIGNS])
    torch.testing.assert_close(output(model), alone["gated"], rtol=1e-4, atol=1e-5)
    a3fta.set_adapters(model, list(DESIGNS), 0.5)
    together = output(model)
    assert all(not torch.allclose(together, x, atol=1e-4) for x in (stock, *alone.values()))
    with a3fta.disabled(model):
        assert torch.equal(output(model), stock)


@native
@every_design
def test_the_ledger_counts_it(design):
    """On fake tensors as on real ones: what w_up, b_up and g are computed to is kept, no more."""
    model, _ = injected(design, train=True, backend="native")
    plain, _ = injected("bottleneck", train=True, backend="native")
    batch = models.inputs("sd15")
    found, base = (a3fta.memory.ledger(m, **batch) for m in (model, plain))
    assert found.entries == record(model, (), batch).entries
    adapters = [layer.adapters["default"] for layer in a3fta.projections(model).values()]
    assert found.trainable == sum(p.nbytes for a in adapters for p in a.parameters())
    products = sum(a.w_up.nbytes + a.b_up.nbytes for a in adapters)
    # of the timed ones what it is computed from is kept too: one embedding, for all layers
    more = {
        "bottleneck": 0,
        "gated": products + 4 * len(adapters),
        "half_open": products + 4 * len(adapters),
        "scaled": products,
        "rescaled": products,
        "film": 4 * timestep.WIDTH + sum(8 * a.rank for a in adapters),
        "time_scaled": 4 * timestep.WIDTH + 4 * len(adapters),
    }
    assert found.total - base.total == more[design]
