"""Adapters on a slice of the input's columns: what is beside it neither sees nor keeps them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from a3fta_kernels import backends, merging, projection
from a3fta_kernels.conversion import adapt

from .test_projection import BACKENDS, Tagged, add, formula, linear

EXACTLY = dict(rtol=0, atol=0)


def make(cls=nn.Linear, backend="auto", dtype=torch.float32):
    layer = adapt(linear(cls, inputs=64, dtype=dtype), backend, (8, 16))
    add(layer, "a", dtype=dtype)
    return layer


@pytest.mark.parametrize("count", [1, 2])
def test_fused_where_the_weight_is_plain(count, monkeypatch):
    layer = make(dtype=torch.float64)
    if count == 2:
        add(layer, "bb", 0.5)
    monkeypatch.setattr(projection.ops, "adapter", None)
    h = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(layer(h), formula(layer, h))


@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_untrained_adapter_changes_nothing(cls, backend):
    layer = make(cls, backend)
    nn.init.zeros_(layer.adapters["a"].w_up)
    nn.init.zeros_(layer.adapters["a"].b_up)
    h = torch.randn(3, 64)
    y = layer(h)
    layer.enabled = False
    torch.testing.assert_close(y, layer(h), **EXACTLY if backend == "reference" else {})


def test_apart_from_the_layer_only_the_slice_is_kept():
    layer = make(Tagged)
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    h = torch.randn(128, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer(h * 1)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    assert 128 * 16 * 4 <= sum(n for p, n in kept.items() if p not in own) < 128 * 64 * 4


@pytest.mark.parametrize("cls", [nn.Linear, Tagged])
def test_under_autocast(cls):
    layer = make(cls)
    h = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(h)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), formula(layer, h), rtol=0.05, atol=0.05)


def test_attention_is_never_part_of_it():
    layer = make()
    q = torch.randn(1, 2, 16)
    assert layer.attend(q, q, q, heads=2) is None


def test_merged_into_the_slice():
    layer = make(dtype=torch.float64)
    model = nn.Sequential(layer)
    layer.adapters["a"].activation = "identity"
    h = torch.randn(3, 64, dtype=torch.float64)
    before, expected = layer.weight.clone(), layer(h)
    merging.merge(model)
    torch.testing.assert_close(layer(h), expected)
    assert (layer.weight != before).any(0).nonzero().flatten().tolist() == list(range(8, 24))
    merging.unmerge(model)
    assert torch.equal(layer.weight, before)


def test_what_is_frozen_is_of_the_slice():
    if not backends()["native"].available:
        pytest.skip(backends()["native"].reason)
    layer = make(backend="native").eval()
    h = torch.randn(3, 64)
    before = layer(h)
    assert layer.freeze() and layer.frozen.v.shape == (24, 4)
    assert torch.equal(layer(h), before)
