"""Optimizers and schedules by name."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from a3fta_kernels.train import optimizers
from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.optimizers import OPTIMIZERS
from a3fta_kernels.train.settings import SCHEDULES
from tests.train import setups


def parameters():
    return [torch.nn.Parameter(torch.arange(4.0))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_of_a_name(name):
    kind = OPTIMIZERS[name]
    if kind.package != "torch":
        pytest.importorskip(kind.module.split(".")[0])
    settings = setups.settings(optimizer=name, weight_decay=0.125, learning_rate=None)
    optimizer = optimizers.build(settings, parameters())
    assert type(optimizer).__name__ == kind.cls
    (group,) = optimizer.param_groups
    assert group["lr"] == kind.learning_rate and group["weight_decay"] == 0.125
    for option, value in kind.options.items():
        assert group[option] == value
    given = setups.settings(optimizer=name, learning_rate=0.25)
    assert optimizers.build(given, parameters()).param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_lowers_a_loss(name):
    if OPTIMIZERS[name].package != "torch":
        pytest.importorskip(OPTIMIZERS[name].module.split(".")[0])
    (weight,) = parameters()
    rate = 0.1 if name != "prodigy" else None
    optimizer = optimizers.build(setups.settings(optimizer=name, learning_rate=rate), [weight])
    for _ in range(20):
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        optimizer.step()
    assert weight.square().sum() < 14


def test_a_rate_of_nothing_is_one(tmp_path):
    settings = setups.settings(learning_rate=0.0)
    assert optimizers.build(settings, parameters()).param_groups[0]["lr"] == 0


def test_an_unknown_name_is_named():
    with pytest.raises(TrainingError, match="one of adamw, adamw8bit, prodigy, got 'sgd'"):
        optimizers.check("sgd")


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy"])
def test_a_missing_package_is_named(name, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(f"No module named {module!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    package = OPTIMIZERS[name].package
    with pytest.raises(TrainingError, match=f"{name} needs {package}: pip install {package}"):
        optimizers.check(name)


def rates(schedule, steps=10, warmup=4):
    settings = setups.settings(schedule=schedule, steps=steps, warmup=warmup, learning_rate=2.0)
    optimizer = optimizers.build(settings, parameters())
    rate = optimizers.schedule(settings, optimizer)
    found = []
    for _ in range(steps):
        found.append(rate.get_last_lr()[0])
        optimizer.step()
        rate.step()
    return found


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    ramp = [0.0, 0.5, 1.0, 1.5]
    rest = {
        "constant": None,
        "constant_with_warmup": [2.0] * 6,
        "linear": [2.0 * (1 - i / 6) for i in range(6)],
        "cosine": [1.0 + math.cos(math.pi * i / 6) for i in range(6)],
    }[schedule]
    expected = [2.0] * 10 if rest is None else ramp + rest
    assert rates(schedule) == pytest.approx(expected, abs=1e-5)
