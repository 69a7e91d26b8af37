"""The training run under lean levels, a few steps of it: what it records, and that it can fail."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from benchmarks import lean_gradients, lean_training
from benchmarks.lean_gradients import EIGHT_BITS, EXACT, LEVELS

TINY = lean_training.Options(steps=1, batch_size=8, seeds=(0,), pretraining=2, heldout_per_class=1)


@pytest.fixture(scope="module")
def measured():
    said: list[str] = []
    found = lean_training.measure(TINY, said.append)
    return json.loads(json.dumps(found)), "\n".join(said)


@pytest.mark.parametrize("trunk", ["demo", "transformer"])
def test_gradients_stay_those_of_the_stock_model(measured, trunk):
    levels = measured[0]["trunks"][trunk]["verdict"]["levels"]
    assert levels.keys() == {*EXACT, *EIGHT_BITS}
    for level, of in levels.items():
        assert of["worst"]["cosine"] >= (1 - 1e-5 if level in EXACT else 0.999), (level, of)
        assert of["gradients"] is True and of["below"] == []
        # the eight bits are really there
        assert (of["median cosine"] < 1 - 1e-9) == (level in EIGHT_BITS)


@pytest.mark.parametrize("trunk", ["demo", "transformer"])
def test_what_is_recorded(measured, trunk):
    found = measured[0]["trunks"][trunk]
    kept = found["kept bytes, batch 32"]
    assert kept.keys() == found["losses"].keys() == LEVELS.keys()
    assert kept["stock"] > kept["exact"] > kept["compressed"]
    for level, seeds in found["losses"].items():
        assert list(seeds) == ["0"]
        assert len(seeds["0"]["train"]) == TINY.steps
        assert list(seeds["0"]["heldout"]) == ["0", "1"]
        # before the first step every level computes the same
        before, stock = (found["losses"][n]["0"]["heldout"]["0"] for n in (level, "stock"))
        assert before == pytest.approx(stock, rel=1e-5)
    losses = list(found["losses"]["stock"]["0"]["heldout"].values())
    assert losses[-1] != losses[0]
    assert [p["step"] for p in found["probes"]["0"]] == [0, 1]
    assert found["verdict"]["seed noise"] is None
    assert trunk in measured[1] and "not judged" in measured[1]


def test_a_wrong_gradient_is_seen(monkeypatch):
    real = lean_gradients.gradients

    def off(model, level, batch):
        grads = real(model, level, batch)
        if level == "compressed":
            name = next(iter(grads))
            grads[name] = grads[name] + grads[name].norm() * torch.ones_like(grads[name])
        return grads

    monkeypatch.setattr(lean_gradients, "gradients", off)
    start = lean_training.base.load()
    data, schedule = lean_training.digits.load(0, heldout_per_class=1), start.noise()
    trunk = start.model()
    runs = {
        level: {seed: lean_training.Run(heldout={4: 0.5 + 0.01 * seed + shift}) for seed in (0, 1)}
        for level, shift in zip(LEVELS, (0.0, 0.0, 1e-3, 1e-3, 0.1), strict=True)
    }
    runs["stock"][0].probes = lean_training.train(trunk, "stock", 0, data, schedule, TINY).probes
    levels = lean_training.verdict(runs)["levels"]
    assert {n: of["gradients"] for n, of in levels.items()} == {
        "exact": True, "block": True, "compressed": False, "block-int8": True,
    }  # fmt: skip
    assert {n: of["loss"] for n, of in levels.items()} == {
        "exact": True, "block": False, "compressed": True, "block-int8": False,
    }  # fmt: skip


def test_cosines_of_zero():
    zero, one = torch.zeros(3), torch.ones(3)
    assert lean_gradients.cosine(zero, zero) == 1.0
    assert lean_gradients.cosine(zero, one) == lean_gradients.cosine(one, zero) == 0.0
    assert lean_gradients.cosine(one, -one) == pytest.approx(-1.0)
