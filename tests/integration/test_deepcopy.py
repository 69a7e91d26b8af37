"""copy.deepcopy and pickle give an independent model with the same adapters."""

from __future__ import annotations

import copy

import torch

import a3fta_kernels as a3fta

from .common import adapted_unet, forward, inputs, randomize


def test_copy_is_equal_and_independent():
    model = adapted_unet()
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, activation="silu"), name="other")
    randomize(model, seed=5)
    a3fta.set_adapters(model, ["default", "other"], [1.0, 0.5])
    batch = inputs(model)
    expected = forward(model, batch)

    twin = copy.deepcopy(model)
    assert torch.equal(forward(twin, batch), expected)
    mine = {id(p) for p in a3fta.trainable_parameters(model)}
    theirs = {id(p) for p in a3fta.trainable_parameters(twin)}
    assert mine and not mine & theirs

    randomize(twin, seed=6)
    a3fta.set_adapters(twin, "default")
    assert torch.equal(forward(model, batch), expected)
    changed = forward(twin, batch)
    assert not torch.equal(changed, expected)

    a3fta.disable_adapters(model)
    assert torch.equal(forward(twin, batch), changed)
    a3fta.enable_adapters(model)
    a3fta.eject(twin)
    assert torch.equal(forward(model, batch), expected)
