"""What holds for every family, on a small model of each (tests/models/<family>.py)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels.processors import family_of

from .. import models
from ..models.zoo import ZOO

CONFIG = a3fta.AdapterConfig(rank=4)
every_model = pytest.mark.parametrize("name", ZOO)


def adapted(name: str, backend: str = "auto") -> nn.Module:
    """With adapters as training might have left them."""
    model = ZOO[name].build()
    a3fta.inject(model, CONFIG, backend=backend)
    models.randomize(model)
    return model


def gradients(name: str, model: nn.Module, **batch: Any) -> list[Tensor]:
    y = ZOO[name].run(model, **batch)
    return list(torch.autograd.grad(y.square().mean(), list(a3fta.trainable_parameters(model))))


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        assert y.norm() > 0
        assert (x - y).norm() <= tolerance * y.norm()


@every_model
def test_where_attention_is_handed_over(name):
    small, model = ZOO[name], ZOO[name].build()
    assert family_of(model).name == small.family
    report = a3fta.inject(model, CONFIG)
    assert report.families == {small.family: sum(small.projections.values())}
    for pattern, count in small.projections.items():
        assert sum(bool(re.fullmatch(pattern, layer)) for layer in report.layers) == count, pattern
    for layer, found in report.layers.items():
        wanted = [c for pattern, c in small.columns.items() if re.fullmatch(pattern, layer)]
        assert [found.columns] == (wanted or [None]), layer
        assert found.fused, (layer, found.why_not_fused)


@every_model
def test_there_and_back(name):
    """The same bits before training and after eject; in between adapters train and only they."""
    small, model = ZOO[name], ZOO[name].build()
    before = models.snapshot(model)
    with torch.no_grad():
        expected = small.run(model)
        a3fta.inject(model, CONFIG, backend="reference")
        assert torch.equal(small.run(model), expected)
    models.randomize(model)
    y = small.run(model)
    assert not torch.allclose(y, expected, rtol=1e-2, atol=1e-3)
    y.square().mean().backward()
    for key, parameter in model.named_parameters():
        has_gradient = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert has_gradient == (".adapters.default." in key), key
    a3fta.eject(model)
    models.assert_unchanged(model, before)
    with torch.no_grad():
        assert torch.equal(small.run(model), expected)


@every_model
def test_backends_agree(name):
    found = [gradients(name, adapted(name, backend)) for backend in ("auto", "reference")]
    assert_close(*found, tolerance=1e-3)


@every_model
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
        pytest.skip(f"{type(model).__name__} has no gradient checkpointing")
    expected = gradients(name, model)
    model.enable_gradient_checkpointing()
    assert_close(gradients(name, model), expected, tolerance=1e-5)


@every_model
def test_one_graph(name):
    """fullgraph, and no new one when the adapters' numbers change."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, example: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    small, model = ZOO[name], adapted(name)
    batch = small.batch()
    compiled = torch.compile(model, fullgraph=True, backend=count)
    with torch.no_grad():
        for seed in (2, 3):
            models.randomize(model, seed=seed)
            found, expected = (f(**batch, return_dict=False)[0] for f in (compiled, model))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


@every_model
@pytest.mark.parametrize("level", ["exact", "recompute", "block"])
def test_lean(name, level):
    model = adapted(name).train()
    expected = gradients(name, model)
    kept = a3fta.memory.ledger(model, **ZOO[name].batch()).total
    a3fta.lean(model, level)
    assert_close(gradients(name, model), expected, tolerance=1e-3)
    assert 0 < a3fta.memory.ledger(model, **ZOO[name].batch()).total <= kept
    a3fta.lean(model, "off")
    assert_close(gradients(name, model), expected, tolerance=1e-6)
