"""diffusers' regional compilation: each kind of repeated block is compiled once, with adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import a3fta_kernels as a3fta

from .. import models
from .common import adapter_grads

FEWER = {"flux": {"num_layers": 1}}  # tracing is what takes time


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def adapted(name: str, *adapters: str) -> tuple[nn.Module, dict[str, Any]]:
    model = models.sd3() if name == "sd3" else models.build(name, **FEWER.get(name, {}))
    batch = models.sd3_inputs() if name == "sd3" else models.inputs(name)
    for adapter in adapters:
        a3fta.inject(model, a3fta.AdapterConfig(rank=4), name=adapter)
        models.randomize(model, adapter)
    if name == "sd3":  # diffusers names no blocks for SD3: so does its user
        model._repeated_blocks = ["JointTransformerBlock"]
    return model.train(), batch


def step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**batch).sample
    output.square().mean().backward()
    return output.detach(), adapter_grads(model)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_steps_compile_nothing_anew(name: str):
    model, batch = adapted(name, "default")
    expected = step(model, batch)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    optimizer = torch.optim.SGD(a3fta.trainable_parameters(model), lr=1e-8)
    seen = []
    for _ in range(3):
        assert_close(step(model, batch), expected)
        optimizer.step()
        seen.append(graphs())
    assert seen[0] > 0 and len(set(seen)) == 1, seen


def test_lean_blocks_and_mixing_weights():
    """Lean blocks are found by their stock name; other weights compile nothing anew."""
    model, batch = adapted("sdxl", "default", "other")
    weights = [(1.0, 1.0), (0.5, 1.5), (0.25, 0.75)]
    expected = []
    for chosen in weights:
        a3fta.set_adapters(model, ["default", "other"], chosen)
        expected.append(step(model, batch))
    a3fta.lean(model, "block")
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    seen = []
    for chosen, wanted in zip(weights, expected, strict=True):
        a3fta.set_adapters(model, ["default", "other"], chosen)
        assert_close(step(model, batch), wanted)
        seen.append(graphs())
    assert seen[0] > 0 and len(set(seen)) == 1, seen


def assert_close(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, grad in expected[1].items():
        assert (found[1][name] - grad).norm() <= 1e-3 * grad.norm(), name
