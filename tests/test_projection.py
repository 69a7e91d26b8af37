"""AdaptedProjection: the formula, the choice of path, the frozen state, and no trace after."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from a3fta_kernels import backends, projection
from a3fta_kernels.adapters import AdapterConfig, BottleneckAdapter
from a3fta_kernels.conversion import adapt, adapted_class, restore
from a3fta_kernels.ops.activations import activate
from a3fta_kernels.projection import AdaptedProjection, span, stock_class

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        not backends()["native"].available, reason=backends()["native"].reason
    ),
)
BACKENDS = ["reference", NATIVE]


class Tagged(nn.Linear):
    """A linear class of somebody else's."""

    def forward(self, x):
        return super().forward(x)


def linear(cls=nn.Linear, inputs=16, outputs=24, bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    return cls(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def add(layer, name, weight=1.0, dtype=torch.float64, **options):
    config = AdapterConfig(**({"rank": 4} | options))
    width = span(layer, layer.columns)[1]
    adapter = BottleneckAdapter(width, config.rank, config, dtype=dtype)
    with torch.no_grad():
        for i, p in enumerate(adapter.parameters()):
            generator = torch.Generator().manual_seed(len(name) + 10 * i)
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    layer.adapters[name] = adapter.train(layer.training)
    layer.choose(layer.weights | {name: weight})
    return adapter


def formula(layer, h):
    """h' @ weight.T + bias, written out, adapter by adapter."""
    start, length = layer.columns or (0, h.shape[-1])
    inside = total = h[..., start : start + length]
    for name, weight in layer.weights.items():
        x = layer.adapters[name]
        z = activate(F.linear(inside, x.w_down, x.b_down), x.activation)
        total = total + weight * x.scale * F.linear(z, x.w_up, x.b_up)
    total = torch.cat((h[..., :start], total, h[..., start + length :]), dim=-1)
    return F.linear(total, layer.weight, layer.bias)


@pytest.mark.parametrize("columns", [None, (0, 10), (3, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
@pytest.mark.parametrize(
    "adapters",
    [
        {"a": {}},
        {"a": {"scale": 0.5}, "bb": {"rank": 3, "weight": -0.7, "scale": 2.0}},
        {"a": {"bias": False}, "bb": {"rank": 2, "weight": 0.3}},
        {"a": {}, "bb": {"activation": "relu", "weight": 0.6, "bias": False}},
        {"a": {"activation": "silu", "weight": 0.0}, "bb": {"activation": "silu"}, "ccc": {}},
    ],
)
def test_parallel_adapters_follow_the_formula(backend, cls, adapters, columns):
    layer = adapt(linear(cls), backend, columns)
    for name, options in adapters.items():
        add(layer, name, **options)
    h = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(2, 5, 24, dtype=torch.float64)
    dy = torch.randn(2, 5, 24, dtype=torch.float64)
    wanted = [h, *layer.adapters.parameters()]
    expected = formula(layer, h) + residual
    gradients = torch.autograd.grad(expected, wanted, dy)
    y = layer(h, residual=residual)
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, wanted, dy), gradients, strict=True):
        torch.testing.assert_close(got, want)
    # the weighted adapters do more than one of them, and than none
    assert not torch.allclose(y, F.linear(h, layer.weight, layer.bias) + residual)


def test_no_active_adapter_is_the_stock_layer():
    stock = linear(dtype=torch.float32)
    layer = adapt(copy.deepcopy(stock))
    h, residual = torch.randn(3, 16), torch.randn(3, 24)
    assert torch.equal(layer(h), stock(h))
    add(layer, "a", dtype=torch.float32)
    assert not torch.equal(layer(h), stock(h))
    layer.enabled = False
    assert torch.equal(layer(h), stock(h))
    assert torch.equal(layer(h, residual=residual), stock(h) + residual)


@pytest.mark.parametrize("columns", [None, (2, 8)])
@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
def test_adapt_and_restore_leave_no_trace(cls, columns):
    layer = linear(cls)
    attributes, state = set(vars(layer)), layer.state_dict()
    weight = layer.weight
    projection = adapt(layer, columns=columns)
    assert projection is layer and isinstance(layer, cls) and layer.weight is weight
    assert stock_class(projection) is cls and type(layer) is adapted_class(cls)
    add(projection, "a")
    extra = set(layer.state_dict()) - set(state)
    assert extra == {f"adapters.a.{k}" for k in ("w_down", "w_up", "b_down", "b_up")}
    restore(projection)
    assert type(layer) is cls and set(vars(layer)) == attributes
    assert list(layer.state_dict()) == list(state) and "adapters" not in repr(layer)


@pytest.mark.parametrize("columns", [None, (2, 8)])
@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
def test_pickle_and_deepcopy(cls, columns):
    layer = adapt(linear(cls), columns=columns)
    add(layer, "a", 0.5)
    h = torch.randn(3, 16, dtype=torch.float64)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer) and twin.weights == {"a": 0.5}
        assert torch.equal(twin(h), layer(h))
        add(twin, "a", 0.1)
        twin.choose({"a": 0.2})
        assert layer.weights == {"a": 0.5} and not torch.equal(twin(h), layer(h))


def reasons():
    plain = adapt(linear())
    meta = adapt(nn.Linear(4, 4, device="meta").requires_grad_(False))
    packed = adapt(nn.Linear(4, 4).requires_grad_(False))
    packed.weight.data = packed.weight.data.to(torch.float8_e4m3fn)
    yield plain, None
    yield adapt(linear(Tagged)), "of class Tagged"
    yield meta, "meta device"
    yield packed, "stored as torch.float8"
    trains = adapt(linear())
    trains.weight.requires_grad_(True)
    yield trains, "itself trains"


@pytest.mark.parametrize("index", range(5))
def test_unfused_reason(index):
    layer, reason = list(reasons())[index]
    assert layer.unfused_reason() is None if reason is None else reason in layer.unfused_reason()


def test_a_layer_that_trains_gets_its_gradient():
    layer = adapt(linear())
    add(layer, "a")
    layer.weight.requires_grad_(True)
    h = torch.randn(2, 3, 16, dtype=torch.float64)
    wanted = [layer.weight, layer.adapters["a"].w_down]
    got = torch.autograd.grad(layer(h).square().sum(), wanted)
    want = torch.autograd.grad(formula(layer, h).square().sum(), wanted)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_masks_ranks_per_sample(backend):
    layer = adapt(linear(), backend).train()
    adapter = add(layer, "a", dropout=0.5, rank=64)
    add(layer, "bb", rank=2)
    h = torch.randn(4, 6, 16, dtype=torch.float64)
    torch.manual_seed(3)
    mask = adapter.kept(4, h.device) - 1
    assert set(mask.unique().tolist()) == {-1.0, 1.0}
    torch.manual_seed(3)
    y = layer(h)
    z = F.gelu(F.linear(h, adapter.w_down, adapter.b_down)) * (1 + mask[:, None])
    other = layer.adapters["bb"]
    z2 = F.gelu(F.linear(h, other.w_down, other.b_down))
    total = h + F.linear(z, adapter.w_up, adapter.b_up) + F.linear(z2, other.w_up, other.b_up)
    torch.testing.assert_close(y, F.linear(total, layer.weight, layer.bias))
    layer.eval()
    torch.testing.assert_close(layer(h), formula(layer, h))


def test_parameters_are_never_narrowed():
    layer = adapt(linear(dtype=torch.float32))
    adapter = add(layer, "a", dtype=torch.float32)
    before = adapter.w_down
    for narrower in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        layer.to(narrower)
        assert layer.weight.dtype == narrower
        assert adapter.w_down.dtype == torch.float32 and adapter.w_down is before
    layer.double()
    assert adapter.w_down.dtype == torch.float64
    half = adapt(linear(dtype=torch.float32))
    add(half, "a", dtype=torch.bfloat16)
    half.half()
    assert half.adapters["a"].w_up.dtype == torch.bfloat16
    half.to("meta")
    assert half.adapters["a"].w_up.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_adapter_on_a_half_precision_layer(dtype, device):
    layer = adapt(linear(dtype=torch.float32)).to(device=device, dtype=dtype)
    adapter = add(layer, "a", dtype=torch.float32).to(device)
    h = torch.randn(2, 5, 16, device=device, dtype=dtype)
    y = layer(h)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert adapter.w_down.grad.dtype == torch.float32 and adapter.w_down.grad.abs().sum() > 0
    exact = formula(copy.deepcopy(layer).double(), h.double())
    assert (y.double() - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("residual", [None, torch.float32, torch.bfloat16])
def test_residual_of_another_dtype_is_added_outside(residual):
    layer = adapt(linear(dtype=torch.bfloat16), "reference")
    add(layer, "a", dtype=torch.float32)
    h = torch.randn(2, 5, 16, dtype=torch.bfloat16)
    r = None if residual is None else torch.randn(2, 5, 24, dtype=residual)
    y = layer(h, residual=r)
    assert torch.equal(y, layer(h) if r is None else layer(h) + r)


class TestFrozen:
    def make(self, backend="native", **options):
        layer = adapt(linear(dtype=torch.float32), backend).eval()
        add(layer, "a", dtype=torch.float32, **options)
        return layer

    @pytest.fixture(autouse=True)
    def needs_native(self):
        if not backends()["native"].available:
            pytest.skip(backends()["native"].reason)

    def test_same_numbers_and_kept_v(self):
        layer = self.make()
        add(layer, "bb", 0.5, dtype=torch.float32)
        h, residual = torch.randn(2, 5, 16), torch.randn(2, 5, 24)
        before = layer(h, residual=residual)
        assert layer.freeze() and layer.frozen is not None
        assert torch.equal(layer(h, residual=residual), before)
        # frozen means frozen: what is kept does not follow the weights
        layer.adapters["a"].w_up.data.zero_()
        assert torch.equal(layer(h, residual=residual), before)
        layer.train()
        assert layer.frozen is None
        assert not torch.equal(layer(h, residual=residual), before)

    @pytest.mark.parametrize(
        "thaw",
        [
            lambda m: m.train(),
            lambda m: m.load_state_dict(m.state_dict()),
            lambda m: m.double(),
            lambda m: m.to("cpu"),
        ],
    )
    def test_thaws(self, thaw):
        layer = self.make()
        assert layer.freeze()
        layer.eval()
        assert layer.frozen is not None
        thaw(layer)
        assert layer.frozen is None

    def test_nothing_to_keep(self):
        assert not self.make("reference").freeze()
        mixed = self.make()
        add(mixed, "bb", activation="relu", dtype=torch.float32)
        assert not mixed.freeze()
        mixed.enabled = False
        assert not mixed.freeze()

    def test_another_dtype_goes_around_it(self):
        layer = self.make()
        h = torch.randn(2, 5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            expected = layer(h)
            layer.frozen = None
        layer.freeze()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(h), expected)


@pytest.mark.parametrize("columns", [None, (2, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
def test_fullgraph_compile(backend, cls, columns):
    torch._dynamo.reset()
    layer = adapt(linear(cls, dtype=torch.float32), backend, columns)
    add(layer, "a", dtype=torch.float32)
    add(layer, "bb", 0.5, dtype=torch.float32)
    h = torch.randn(2, 5, 16)
    wanted = list(layer.adapters.parameters())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(h), layer(h)
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.square().sum(), wanted)
    want = torch.autograd.grad(expected.square().sum(), wanted)
    for x, z in zip(got, want, strict=True):
        torch.testing.assert_close(x, z)


def test_a_new_weight_does_not_compile_anew():
    torch._dynamo.reset()
    layer = adapt(linear(dtype=torch.float32), "reference")
    add(layer, "a", dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    h = torch.randn(2, 5, 16)
    with torch.no_grad():
        for weight in (1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.2):
            layer.choose({"a": weight})
            torch.testing.assert_close(compiled(h), layer(h))
    assert counter.frame_count <= 2


def test_a_weight_chosen_in_inference_mode_serves_a_backward():
    torch._dynamo.reset()
    layer = adapt(linear(dtype=torch.float32), "reference")
    add(layer, "a", dtype=torch.float32)
    with torch.inference_mode():
        layer.choose({"a": 0.5})
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 5, 16))
    assert all(g.any() for g in torch.autograd.grad(y.square().sum(), layer.adapters.parameters()))


def test_compiled_dropout():
    torch._dynamo.reset()
    layer = adapt(linear(dtype=torch.float32), "reference").train()
    add(layer, "a", dtype=torch.float32, dropout=0.5)
    h = torch.randn(2, 5, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [compiled(h) for _ in range(8)]
    assert any(not torch.equal(results[0], y) for y in results[1:])


def test_the_reason_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(projection, "_logged", set())
    layers = [adapt(linear(Tagged)) for _ in range(2)]
    with caplog.at_level("INFO", logger="a3fta_kernels"):
        for layer in layers * 2:
            add(layer, f"a{len(layer.adapters)}")
            layer(torch.randn(2, 16, dtype=torch.float64))
    (record,) = caplog.records
    assert "the layer is of class Tagged, not a plain Linear" in record.getMessage()


class TestWrappedForward:
    """Hooks of other libraries replace `forward` on the instance."""

    def test_accelerate_hook_before_and_after(self):
        hooks = pytest.importorskip("accelerate.hooks")
        seen = []

        class Spy(hooks.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                seen.append(type(module).__name__)
                return args, kwargs

        layer = linear(dtype=torch.float32)
        h = torch.randn(3, 16)
        stock = layer(h)
        hooks.add_hook_to_module(layer, Spy())
        adapt(layer)
        add(layer, "a", dtype=torch.float32)
        changed = layer(h, residual=torch.zeros(3, 24))
        assert not torch.equal(changed, stock) and seen == ["AdaptedProjection"]
        restore(layer)
        assert torch.equal(layer(h), stock) and seen[-1] == "Linear"
        adapt(layer)
        add(layer, "a", dtype=torch.float32)
        hooks.remove_hook_from_module(layer)
        assert torch.equal(layer(h), changed)
        restore(layer)
        assert torch.equal(layer(h), stock)

    def test_diffusers_hook(self):
        module = pytest.importorskip("diffusers.hooks")
        seen = []

        class Spy(module.ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                seen.append(type(module).__name__)
                return args, kwargs

        layer = linear(dtype=torch.float32)
        h = torch.randn(3, 16)
        stock = layer(h)
        registry = module.HookRegistry.check_if_exists_or_initialize(layer)
        registry.register_hook(Spy(), "spy")
        adapt(layer)
        add(layer, "a", dtype=torch.float32)
        assert not torch.equal(layer(h), stock) and seen == ["AdaptedProjection"]
        restore(layer)
        assert torch.equal(layer(h), stock) and len(seen) == 2

    def test_an_unknown_wrapper_is_refused(self):
        layer = linear()
        layer.forward = functools.partial(nn.Linear.forward, layer)
        with pytest.raises(ValueError, match="inject first, then"):
            adapt(layer)
        assert type(layer) is nn.Linear and not hasattr(layer, "adapters")


def test_static_class_is_importable():
    assert pickle.loads(pickle.dumps(AdaptedProjection)) is AdaptedProjection
