from __future__ import annotations

import math
from dataclasses import replace

import pytest

from a3fta_kernels.study.run import columns
from a3fta_kernels.study.table import shown
from a3fta_kernels.study.views import matched_loss, parse, step_of, value
from tests.study.fakes import run
from tests.study.tiny import plan


def test_views_are_steps():
    one = run(early=50, train=[0.9, 0.5, 0.495], heldout=[0.6, 0.7, 0.8])
    assert step_of(one, "last") == 100
    assert step_of(one, "early") == 50
    assert step_of(one, "oracle") == 25
    assert step_of(one, "converged") == 50  # 0.5 falls by 1 % from there on
    assert step_of(one, "matched", 0.88) == 25
    assert value(one, "oracle", "gap") == pytest.approx(-0.3)
    with pytest.raises(ValueError, match="view: expected one of last, early"):
        step_of(one, "best")


def test_passes_are_steps_in_proportion_at_the_nearest_checkpoint():
    one = run()  # checkpoints 25, 50, 100; 1.5 times as long
    at = {early: step_of(replace(one, early=early), "passes") for early in (25, 50, 100)}
    assert at == {25: 50, 50: 100, 100: 100}  # 37.5, 75 and 150
    assert step_of(replace(one, early=50, longer=4 / 3), "passes") == 50  # 67 is nearer to 50
    assert step_of(run("base"), "passes") == 0


def test_what_has_diverged_is_never_chosen():
    one = run(train=[0.9, 0.5, math.nan], heldout=[0.6, 0.5, math.nan])
    assert step_of(one, "oracle") == 50
    assert step_of(one, "matched", 0.1) == 50


def test_the_matched_loss_is_reached_by_all_methods():
    runs = [run(train=[0.9, 0.2, 0.1]), run("gelu", train=[0.9, 0.6, 0.4]), run("base", train=0.95)]
    assert matched_loss(runs) == 0.4
    assert math.isnan(matched_loss([runs[-1]]))


def test_a_line_becomes_a_run():
    cells = dict.fromkeys(columns(plan()), "0.5 0.25")
    cells |= {
        "plan": "abc", "pair": "bars", "method": "gelu", "k": "6", "seed": "1", "rate": "0.001",
        "parameters": "12", "step_ms": "nan", "peak_bytes": "7", "saved_bytes": "5",
        "seconds": "3.5", "early": "2", "steps": shown([2, 4]),
    }  # fmt: skip
    found = parse(cells, folds=4)
    assert (found.method, found.k, found.seed, found.early, found.steps) == (
        "gelu",
        6,
        1,
        2,
        (2, 4),
    )
    assert found.longer == pytest.approx(4 / 3)
    assert found.at("kid_2", 4) == 0.25 and found.rate == 0.001
    assert found.curves["heldout_bin2"] == [0.5, 0.25]
