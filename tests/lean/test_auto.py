"""Level auto: any feasible budget is met, and closely."""

from __future__ import annotations

import re

import pytest

import a3fta_kernels as a3fta
from a3fta_kernels.memory import ledger

from .. import models
from .common import assert_same_step, batch_for, step, trained


@pytest.fixture(scope="module")
def extremes() -> tuple[int, int]:
    """What the small model keeps at exact, and at least."""
    model, batch = trained("sdxl"), batch_for("sdxl")
    a3fta.lean(model, "exact")
    most = ledger(model, **batch).total
    a3fta.lean(model, "block", norms="int8")
    return most, ledger(model, **batch).total


@pytest.mark.parametrize("share", [1.0, 0.35, 0.0])
def test_a_feasible_budget_is_met(share, extremes):
    most, least = extremes
    budget = int(least + share * (most - least))
    model, batch = trained("sdxl"), batch_for("sdxl")
    expected = step(model, batch)
    report = a3fta.lean(model, "auto", budget=budget, inputs=batch, norms="int8")
    found = ledger(model, **batch).total
    assert found <= budget
    # no block's step is larger than this: the budget is used
    assert share == 1.0 or found >= budget - 0.2 * (most - least)
    said = re.search(r"(\S+ \wiB) kept for the backward, (\S+ \wiB) under the budget", str(report))
    assert said, report
    assert_same_step(step(model, batch), expected, 5e-2)
    if share == 1.0:
        assert set(report.levels.values()) == {"exact"}


def test_without_eight_bits_nothing_is_narrowed(extremes):
    model, batch = trained("sdxl"), batch_for("sdxl")
    a3fta.lean(model, "block")
    least = ledger(model, **batch).total
    report = a3fta.lean(model, "auto", budget=least, inputs=batch)
    assert {s.norms for s in report.settings.values()} == {"input"}
    assert ledger(model, **batch).total <= least


def test_patterns_are_kept():
    model, batch = trained("sdxl"), batch_for("sdxl")
    report = a3fta.lean(
        model, "auto", budget="1GiB", inputs=batch, levels={r"^mid_block\.att": "block"}
    )
    blocks = {n: level for n, level in report.levels.items() if "attentions" in n}
    assert {level for n, level in blocks.items() if n.startswith("mid_block")} == {"block"}
    assert {level for n, level in blocks.items() if not n.startswith("mid")} == {"exact"}


def test_an_impossible_budget_names_the_least_and_changes_nothing(extremes):
    model, batch = trained("sdxl"), batch_for("sdxl")
    a3fta.lean(model, "recompute", levels={"mid": "exact"})
    before = models.snapshot(model)
    with pytest.raises(ValueError, match=rf"budget: expected at least .*\({extremes[1]} bytes\)"):
        a3fta.lean(model, "auto", budget=extremes[1] - 1, inputs=batch, norms="int8")
    models.assert_unchanged(model, before)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(budget=10), TypeError, "inputs: expected the keyword arguments"),
        (dict(inputs={}), TypeError, "budget: expected bytes, or a size such as '6GiB'"),
        (dict(inputs={}, budget="much"), ValueError, "budget: expected a size such as 12GiB"),
        (dict(inputs={}, budget=True), TypeError, "budget: expected bytes"),
        (dict(level="exact", budget=10), ValueError, "budget: expected None beside level 'exact'"),
        (dict(level="exact", inputs={}), ValueError, "inputs: expected None beside level 'exact'"),
    ],
)
def test_refusals(options, error, message):
    model = trained("sd15")
    before = models.snapshot(model)
    with pytest.raises(error, match=message):
        a3fta.lean(model, **{"level": "auto", **options})
    models.assert_unchanged(model, before)
