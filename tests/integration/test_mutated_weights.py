"""Weights that change behind PyTorch's version counter are seen by the next forward.

Nothing derived from a weight may outlive a forward: fused optimizers, `.data` edits and EMA swaps
leave `_version` and `data_ptr` as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta

from .common import RUNS, adapted_unet, forward, inputs, loss, randomize, set_backend


def fused_adamw(model: nn.Module) -> None:
    parameters = list(a3fta.trainable_parameters(model))
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    loss(model, inputs(model, seed=9)).backward()
    optimizer.step()
    optimizer.zero_grad()


def data_edit(model: nn.Module) -> None:
    for projection in a3fta.projections(model).values():
        adapter = projection.adapters["default"]
        adapter.w_up.data.normal_()
        adapter.w_down.data.mul_(1.5)
        adapter.b_up.data.add_(0.3)


def data_swap(model: nn.Module) -> None:
    for parameter in a3fta.trainable_parameters(model):
        parameter.data = torch.full_like(parameter, 0.05) + parameter.detach()


def ema_swap(model: nn.Module) -> None:
    """The average goes in, as diffusers' EMAModel.store, copy_to and restore do it."""
    parameters = list(a3fta.trainable_parameters(model))
    average = [p.detach().clone().mul_(0.5).add_(0.02) for p in parameters]
    for parameter, value in zip(parameters, average, strict=True):
        parameter.data.copy_(value.data)


def loaded_state(model: nn.Module) -> None:
    other = adapted_unet()
    randomize(other, seed=77)
    model.load_state_dict(other.state_dict())


def frozen_weight(model: nn.Module) -> None:
    """What merging a LoRA into the base does."""
    for projection in a3fta.projections(model).values():
        projection.weight.data.add_(torch.randn_like(projection.weight), alpha=0.1)
        projection.bias.data.add_(0.2)


CHANGES = [fused_adamw, data_edit, data_swap, ema_swap, loaded_state, frozen_weight]


@RUNS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_next_forward_sees_it(
    change: Callable[[nn.Module], None], backend: str, training: bool, device: torch.device
):
    model = adapted_unet(device)
    randomize(model, std=0.0)  # as injected: V = 0 must not stay
    if change is ema_swap:
        randomize(model)
    set_backend(model, backend)
    model.train(training)
    batch = inputs(model)
    before = forward(model, batch)
    loss(model, batch).backward()
    model.zero_grad(set_to_none=True)

    change(model)

    after = forward(model, batch)
    fresh = adapted_unet(device)
    fresh.load_state_dict(model.state_dict())
    set_backend(fresh, "reference")
    expected = forward(fresh, batch)
    size = (expected - before).abs().max()
    assert size > 1e-3, "too small to show"
    assert (after - expected).abs().max() < 0.01 * size
    with torch.enable_grad():
        torch.testing.assert_close(loss(model, batch), loss(fresh, batch), rtol=1e-4, atol=1e-6)
