"""Adapters behind the projection and beside attention, where a part of a forward runs again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import a3fta_kernels as a3fta
from a3fta_kernels.adapters import AdapterConfig

from .. import models
from ..placed import LATE, adapted, late, net_with


def gradients(model: nn.Module, name: str, run: Callable) -> dict[str, Tensor]:
    batch = models.sd3_inputs() if name == "sd3" else models.inputs(name)
    run(**batch).sample.square().mean().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def checkpointed(model: nn.Module) -> Callable:
    model.enable_gradient_checkpointing()
    return model


def as_a_whole(model: nn.Module) -> Callable:
    return lambda **batch: checkpoint(model, use_reentrant=False, **batch)


def leanly(level: str) -> Callable:
    def run(model: nn.Module) -> Callable:
        a3fta.lean(model, level)
        return model

    return run


WAYS = {
    "gradient checkpointing": checkpointed,
    "checkpointed as a whole": as_a_whole,
    "lean recompute": leanly("recompute"),
    "lean block": leanly("block"),
}


TWICE = [(n, p, w) for n in ("sd15", "sd3", "flux") for p in LATE for w in WAYS]
TWICE += [("unet2d", "parallel", "gradient checkpointing")]  # attention of an image, 4-D


@pytest.mark.parametrize(("name", "placement", "way"), TWICE)
def test_what_is_computed_twice(name, placement, way):
    model = adapted(name, placement)
    expected = gradients(model, name, model)
    found = gradients(model, name, WAYS[way](model))
    assert (
        set(found) == set(expected) == {n for n, p in model.named_parameters() if p.requires_grad}
    )
    for key, grad in expected.items():
        assert grad.any(), key
        assert (found[key] - grad).norm() <= 1e-3 * grad.norm(), key
    assert all(layer.source is None for layer in a3fta.projections(model).values())


@pytest.mark.parametrize("name", ["sd15", "flux"])
@late
def test_lean_takes_their_blocks_but_not_those_with_other_hooks(name, placement):
    model = adapted(name, placement)
    assert "carries hooks" not in str(a3fta.lean(model, "block"))
    attention = next(m for n, m in model.named_modules() if n.endswith(("attn1", ".attn")))
    attention.register_forward_pre_hook(lambda module, args: None)
    assert "a module inside carries hooks (attn" in str(a3fta.lean(model, "block"))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
@late
def test_blocks_that_were_lean_before(name, placement):
    """They look for adapters in each call."""
    expected = gradients(model := adapted(name, placement), name, model)
    model = models.sd3() if name == "sd3" else models.build(name)
    a3fta.lean(model.requires_grad_(False), "block")
    a3fta.inject(model, AdapterConfig(rank=4, placement=placement))
    models.randomize(model, std=0.3)
    found = gradients(model.train(), name, model)
    assert set(found) == set(expected)
    for key, grad in expected.items():
        assert (found[key] - grad).norm() <= 1e-3 * grad.norm(), key


def test_fullgraph_compile():
    torch._dynamo.reset()
    model = net_with("post", "parallel")
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), model(x))
    assert model.attention.to_out[0].source is None


@late
def test_copies_go_their_own_way(placement):
    model = net_with(placement)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), expected)
        models.randomize(twin, placement, seed=9)
        assert not torch.allclose(twin(x), expected)
        assert torch.equal(model(x), expected)
