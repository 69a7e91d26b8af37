"""Where auto finds no kernels, the lean ops keep as little by the same rules in eager PyTorch."""

from __future__ import annotations

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels import ops
from a3fta_kernels.ops.geglu import api as geglu_api
from a3fta_kernels.ops.group_norm import api as group_norm_api
from a3fta_kernels.ops.layer_norm import api as layer_norm_api

from .common import assert_same_step, batch_for, step, trained


@pytest.fixture
def no_kernels(monkeypatch):
    for api in (geglu_api, group_norm_api, layer_norm_api):
        monkeypatch.setattr(api, "resolve", lambda *_: "reference")


CALLS = {
    "geglu": lambda x, b: ops.geglu(x, backend=b),
    "geglu silu": lambda x, b: ops.geglu(x, activation="silu", backend=b),
    "layer_norm": lambda x, b: ops.layer_norm(x, W, B, backend=b),
    "layer_norm, plain": lambda x, b: ops.layer_norm(x, backend=b),
    "group_norm": lambda x, b: ops.group_norm(x.transpose(1, 2), 4, W, B, backend=b),
    "group_norm silu": lambda x, b: ops.group_norm(x, 5, V, V, activation="silu", backend=b),
}
W, B, V = (torch.randn(n, dtype=torch.float64) for n in (16, 16, 5))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_rule_is_that_of_the_specification(name, dtype, no_kernels):
    global W, B, V
    W, B, V = (t.to(dtype) for t in (W, B, V))
    x = (torch.randn(3, 5, 16) * 2 + 1).to(dtype).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = CALLS[name](x, "auto")
    assert sum(t.shape.numel() >= 100 for t in kept) == 1, "one tensor of x's size"
    expected = CALLS[name](x, "reference")
    dy = torch.randn_like(y)
    (dx,), (want,) = (torch.autograd.grad(z, x, dy) for z in (y, expected))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (y - expected).norm() <= tolerance * expected.norm()
    assert (dx - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("level", ["exact", "compressed", "block"])
def test_a_model_keeps_as_little(level, no_kernels):
    model, batch = trained("sd15"), batch_for("sd15")
    expected = step(model, batch)
    a3fta.lean(model, level)
    found = step(model, batch)
    assert_same_step(found, expected, 5e-2 if level == "compressed" else 1e-12)
    assert found.kept < {"exact": 0.75, "compressed": 0.4, "block": 0.3}[level] * expected.kept
