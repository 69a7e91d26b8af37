"""Gradient checkpointing recomputes the adapters and finds the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import a3fta_kernels as a3fta

from .. import models
from .common import adapted_unet, adapter_grads, inputs, loss, randomize


def adapted(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name == "unet":
        model = adapted_unet()
        return model, inputs(model)
    model = models.build(name)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4))
    randomize(model)
    return model, models.inputs(name)


@pytest.mark.parametrize("name", ["unet", "flux"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_same_gradients(reentrant: bool, name: str):
    model, batch = adapted(name)
    model.train()
    loss(model, batch).backward()
    expected = adapter_grads(model)
    model.zero_grad(set_to_none=True)

    if reentrant:  # a reentrant checkpoint only runs backward where an input needs a gradient
        next(iter(batch.values())).requires_grad_(True)

        def checkpoint(function, *args):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=True)

        model.enable_gradient_checkpointing(checkpoint)
    else:
        model.enable_gradient_checkpointing()
    forwards: dict[str, int] = {}
    for name, projection in a3fta.projections(model).items():
        projection.register_forward_hook(lambda *_, name=name: _count(forwards, name))
    loss(model, batch).backward()

    found = adapter_grads(model)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-8)
    recomputed = [name for name, count in forwards.items() if count == 2]
    assert recomputed, f"nothing was checkpointed: {forwards}"


def test_dropout_is_redrawn_the_same():
    """The recomputed forward masks what the first one masked."""
    model = adapted_unet(dropout=0.5)
    model.train()
    batch = inputs(model)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        loss(model, batch).backward()
        grads.append(adapter_grads(model))
        model.zero_grad(set_to_none=True)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-8)


def _count(forwards: dict[str, int], name: str) -> None:
    forwards[name] = forwards.get(name, 0) + 1
