"""What holds for every family, on a small model of each (tests/models/<family>.py)."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

import a3fta_kernels as a3fta
from a3fta_kernels.lean.rules import RULES
from a3fta_kernels.processors import FAMILIES, family_of

from .. import models
from ..models.small import output
from ..models.zoo import ZOO

CONFIG = a3fta.AdapterConfig(rank=4)
BLOCKS = {rule.stock.__name__ for rule in RULES if rule.is_block}
READS_NUMBERS = [name for name, small in ZOO.items() if small.reads_numbers]
NO_LEDGER = [*READS_NUMBERS, *(name for name, small in ZOO.items() if small.takes_sizes)]
FAKES_HAVE_NO_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)
# the first of every family that tests/lean has not, where there is something to gain
FIRST = {small.family: name for name, small in reversed(ZOO.items())}
IN_TESTS_OF_LEAN = ("unet_condition", "unet", "sd3", "flux")
NOT_IN_TESTS_OF_LEAN = [
    name
    for family, name in FIRST.items()
    if family not in IN_TESTS_OF_LEAN and ZOO[name].lean is not None
]
# a graph takes a second or more, and tests/test_inject.py has those of U-Nets and Flux;
# `make fuzz` takes all
COMPILED = ["flux2"]
if "A3FTA_COMPILE" in os.environ:
    COMPILED = [name for name in ZOO if name not in READS_NUMBERS]
every_model = pytest.mark.parametrize("name", ZOO)
every_family = pytest.mark.parametrize("name", FIRST.values())


def adapted(name: str, backend: str = "auto") -> nn.Module:
    """With adapters as training might have left them."""
    model = ZOO[name].build()
    a3fta.inject(model, CONFIG, backend=backend)
    models.randomize(model)
    return model


def matches(patterns: Iterable[str], layer: str) -> bool:
    return any(re.fullmatch(pattern, layer) for pattern in patterns)


def trained(name: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters, without those of layers whose output nothing reads."""
    found = dict(model.named_parameters())
    layers = {key: key.partition(".adapters.") for key in found}
    idle = ZOO[name].idle
    return {
        key: found[key] for key, (layer, a, _) in layers.items() if a and not matches(idle, layer)
    }


def gradients(name: str, model: nn.Module, **batch: Any) -> list[Tensor]:
    torch.manual_seed(0)  # DiT drops classes
    y = ZOO[name].run(model, **batch)
    return list(torch.autograd.grad(y.square().mean(), list(trained(name, model).values())))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        assert y.norm() > 0
        assert (x - y).norm() <= tolerance * y.norm()


def differs(y: Tensor, expected: Tensor) -> bool:
    """By more than rounding."""
    return bool((y - expected).norm() > 1e-5 * expected.norm())


def test_every_family_has_a_small_model():
    assert {small.family for small in ZOO.values()} == set(FAMILIES) - {"structure"}


@every_model
def test_where_attention_is_handed_over(name):
    small, model = ZOO[name], ZOO[name].build()
    assert family_of(model).name == small.family
    report = a3fta.inject(model, CONFIG)
    assert report.families == {small.family: sum(small.projections.values())}
    for pattern, count in small.projections.items():
        assert sum(matches([pattern], layer) for layer in report.layers) == count, pattern
    for layer, found in report.layers.items():
        wanted = [c for pattern, c in small.columns.items() if matches([pattern], layer)]
        assert [found.columns] == (wanted or [None]), layer
        assert found.fused, (layer, found.why_not_fused)


@contextmanager
def recorded_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What softmax attention returns, heads merged: (B, L, H * D)."""
    stock, found = F.scaled_dot_product_attention, []

    def record(*args: Any, **options: Any) -> Tensor:
        y = stock(*args, **options)
        found.append(y.transpose(1, 2).flatten(2))
        return y

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", record)
        yield found


def is_part_of(h: Tensor, attention: Tensor) -> bool:
    """Whether h (B, L, C) is some L neighbouring tokens of it, to the bit."""
    if h.shape[::2] != attention.shape[::2]:
        return False
    starts = range(attention.shape[1] - h.shape[1] + 1)
    return any(torch.equal(attention[:, s : s + h.shape[1]], h) for s in starts)


@every_model
def test_adapters_read_what_attention_returns(name, monkeypatch):
    small, model = ZOO[name], adapted(name)
    inputs: dict[str, Tensor] = {}
    for layer, projection in a3fta.projections(model).items():
        start, length = projection.columns or (0, projection.in_features)

        def read(_: nn.Module, args: Any, layer=layer, start=start, length=length) -> None:
            inputs[layer] = args[0].narrow(-1, start, length)

        projection.register_forward_pre_hook(read)
    with torch.no_grad(), recorded_attention(monkeypatch) as attention:
        small.run(model)
    assert set(inputs) == set(a3fta.projections(model))
    for layer, h in inputs.items():
        as_it_is = any(is_part_of(h, each) for each in attention)
        assert as_it_is != matches(small.other, layer), layer


@every_model
def test_there_and_back(name):
    """The same bits before training and after eject; in between adapters train and only they."""
    small, model = ZOO[name], ZOO[name].build()
    before = models.snapshot(model)
    with torch.no_grad():
        expected = small.run(model)
        # PyTorch multiplies by frozen weights in another order where the input has gaps
        frozen = small.run(small.build().requires_grad_(False))
        torch.testing.assert_close(frozen, expected, rtol=1e-4, atol=1e-5)
        a3fta.inject(model, CONFIG, backend="reference")
        assert torch.equal(small.run(model), frozen)
    models.randomize(model)
    y = small.run(model)
    assert differs(y, expected)
    y.square().mean().backward()
    train = trained(name, model)
    for key, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and bool(parameter.grad.any())
        assert has_gradient == (key in train), key
    with torch.no_grad(), a3fta.disabled(model):
        assert torch.equal(small.run(model), frozen)
    a3fta.eject(model)
    models.assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(small.run(model), expected)


@every_family
def test_backends_agree(name):
    found = [gradients(name, adapted(name, backend)) for backend in ("auto", "reference")]
    assert_close(*found, tolerance=1e-3)


@every_family
def test_file(name, tmp_path):
    model, other = adapted(name), ZOO[name].build()
    a3fta.save_adapter(model, tmp_path)
    a3fta.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert torch.equal(ZOO[name].run(other), ZOO[name].run(model))


@every_model
def test_gradient_checkpointing(name):
    model = adapted(name).train()
    if not getattr(model, "_supports_gradient_checkpointing", False):
        with pytest.raises(ValueError, match="does not support gradient checkpointing"):
            model.enable_gradient_checkpointing()
        return
    expected, stock = gradients(name, model), ZOO[name].build()
    model.enable_gradient_checkpointing()
    if ZOO[name].refuses:
        stock.enable_gradient_checkpointing()
        with pytest.raises(TypeError):
            ZOO[name].run(stock)
        return
    if ZOO[name].forgets:
        y = ZOO[name].run(stock)
        stock.enable_gradient_checkpointing()
        assert differs(ZOO[name].run(stock), y)
        return
    assert_close(gradients(name, model), expected, tolerance=1e-5)


def by_hand(layer: nn.Module, h: Tensor) -> Tensor:
    """The layer of h' = h + g * (act(h @ w_down.T + b_down) @ w_up.T + b_up), in float64."""
    x = copy.deepcopy(layer.adapters["default"]).double()
    g, act = (x.gate.tanh(), F.gelu) if x.config.design == "gated" else (1, lambda a: a)
    start, length = layer.columns or (0, layer.in_features)
    inside = h.narrow(-1, start, length)
    inside += g * F.linear(act(F.linear(inside, x.w_down, x.b_down)), x.w_up, x.b_up)
    return F.linear(h, layer.weight.double(), None if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("options", [{"activation": "identity"}, {"design": "gated"}], ids=str)
@every_family
def test_other_designs(name, options):
    """One step of training, then what every adapted layer computes; linear ones merge."""
    small, model = ZOO[name], ZOO[name].build()
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, **options))
    y = small.run(model)
    y.square().mean().backward()
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    with torch.no_grad():
        for parameter in trained(name, model).values():
            if parameter.grad.any():  # behind a closed gate nothing has one
                parameter -= 0.3 * parameter.grad / parameter.grad.norm()
        layers = list(a3fta.projections(model).values())
        for layer in layers:
            layer.register_forward_hook(lambda m, args, y: calls.append((m, args[0], y)))
        stepped = small.run(model)
        assert differs(stepped, y)
        assert {id(layer) for layer, _, _ in calls} == {id(layer) for layer in layers}
        for layer, h, found in calls:
            expected = by_hand(layer, h.double().clone())
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        if "activation" in options:
            a3fta.merge(model)
            torch.testing.assert_close(small.run(model), stepped, rtol=1e-3, atol=1e-4)


def in_one_graph(model: nn.Module, graphs: list[Any]) -> Callable:
    """The compiled model; every graph that it takes is appended."""

    def count(graph: Any, example: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=count)


@pytest.mark.parametrize("name", COMPILED)
def test_one_graph(name):
    """fullgraph, and no new one when the adapters' numbers change."""
    small, model, graphs = ZOO[name], adapted(name), []
    batch = small.batch()
    compiled = in_one_graph(model, graphs)
    with torch.no_grad():
        for seed in (2, 3):
            models.randomize(model, seed=seed)
            expected, found = (output(f(**batch, return_dict=False)) for f in (model, compiled))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NO_LEDGER)
def test_the_stock_model_reads_numbers(name):
    model, batch = ZOO[name].build(), ZOO[name].batch()
    with pytest.raises(FAKES_HAVE_NO_NUMBERS):
        a3fta.memory.ledger(model, **batch)
    if name in READS_NUMBERS and "A3FTA_COMPILE" in os.environ:
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
            in_one_graph(model, [])(**batch, return_dict=False)
        torch._dynamo.reset()


@every_model
def test_which_blocks_lean_rebuilds(name):
    small, model = ZOO[name], adapted(name)
    if small.lean is None:
        with pytest.raises(ValueError, match="frozen modules that lean knows"):
            a3fta.lean(model, "compressed")
        return
    report = a3fta.lean(model, "block")
    assert Counter(kind for kind in report.kinds.values() if kind in BLOCKS) == small.lean


@pytest.mark.parametrize("name", NOT_IN_TESTS_OF_LEAN)
def test_lean(name):
    """Close to the stock model's gradients with less kept."""
    small, model = ZOO[name], adapted(name).train()
    expected, counted = gradients(name, model), name not in NO_LEDGER
    kept = a3fta.memory.ledger(model, **small.batch()).total if counted else 0
    if a3fta.lean(model, "block").settings:
        assert_close(gradients(name, model), expected, tolerance=1e-3)
    assert a3fta.lean(model, "compressed").settings
    assert_close(gradients(name, model), expected, tolerance=0.1)
    assert not counted or 0 < a3fta.memory.ledger(model, **small.batch()).total < kept
    a3fta.lean(model, "off")
    assert_close(gradients(name, model), expected, tolerance=1e-6)
