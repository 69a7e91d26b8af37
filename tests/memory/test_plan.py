"""Plans: sizes as text, the line over the batch, what fits, and the recommendation."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle

import pytest
import torch

from a3fta_kernels.memory import methods, models, step_peak
from a3fta_kernels.memory import plan as plans
from a3fta_kernels.memory.account import parse_size
from a3fta_kernels.memory.levels import LEVELS
from a3fta_kernels.memory.plan import Job, Row, allowance_of, make_plan, run, runs

from .. import models as small

MIB = 2**20
SOME = ["stock", "block"]  # of the levels: each is a run or two


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("12000MB", 12 * 10**9),
        ("1.5 TiB", 3 * 2**39), ("12gib", 12 * 2**30), ("800 B", 800), ("12", 12),
        (" 2KiB ", 2048),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 GiBs", "-1GB", "0GB", "1e3MB", "12 gallons"])
def test_sizes_that_are_none(text):
    with pytest.raises(ValueError, match="a size such as 12GiB"):
        parse_size(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.build(
        "sd15", block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None,
    ).save_config(path)  # fmt: skip
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """Plans of one model count the same steps again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "run", functools.cache(run))
        yield


@pytest.fixture(scope="module")
def plan(folder):
    return make_plan(folder, 800 * MIB, allowance=700 * MIB, rank=4, levels=SOME)


def test_the_line_is_what_runs_need(folder, plan):
    assert [(r.level, r.precision) for r in plan.rows] == [
        (level, precision) for precision in ("bf16", "fp32") for level in SOME
    ]
    for row in plan.rows[:3]:
        job = Job(folder, plan.resolution, "a3fta", 4, row.level, row.precision, 7)
        found = run(job)
        assert row.weights == found.parameters and row.gradients == found.gradients
        assert row.optimizer == 2 * found.trainable
        assert row.peak(7) == pytest.approx(found.bytes, rel=1e-3)
        one = run(dataclasses.replace(job, batch=1)).bytes
        assert one <= row.peak(1) <= 1.05 * one


def test_the_largest_batch_fits_and_the_next_does_not(plan):
    for row in plan.rows:
        assert row.need(row.batch, plan.allowance) <= plan.memory
        assert row.need(row.batch + 1, plan.allowance) > plan.memory
    assert plan.batch == max(row.batch for row in plan.rows) == plan.best.batch
    assert (plan.best.level, plan.best.precision) == ("block", "bf16")
    assert plan.confirmed <= plan.memory
    model = models.build(plan.model)
    methods.adapt(model, "a3fta", 4, torch.bfloat16)
    LEVELS["block"].apply(model)
    peak = step_peak(model, **models.inputs(model, plan.resolution, plan.batch))
    expected = peak.parameters + 2 * peak.trainable + peak.bytes + plan.allowance
    assert plan.confirmed == expected


def test_a_wanted_batch_takes_the_cheapest_level_that_fits_it(folder, plan):
    stock = plan.rows[0].batch
    calls = []
    options = dict(allowance=700 * MIB, rank=4, precisions=["bf16"], levels=SOME)
    found = make_plan(folder, 800 * MIB, batch=stock, progress=lambda: calls.append(1), **options)
    assert (found.best.level, found.batch) == ("stock", stock)
    assert len(calls) == runs(SOME, ["bf16"]) == 5
    found = make_plan(folder, 800 * MIB, batch=stock + 1, **options)
    assert (found.best.level, found.batch) == ("block", stock + 1)
    found = make_plan(folder, 800 * MIB, batch=10**6, **options)
    assert (found.best, found.batch, found.confirmed) == (None, 0, None)


def test_nothing_fits(folder):
    options = dict(precisions=["bf16"], levels=SOME)
    found = make_plan(folder, 700 * MIB, allowance=700 * MIB, **options)
    assert found.best is None and all(row.batch == 0 for row in found.rows)
    row, need = found.least
    assert row.level == "block" and need == row.need(1, 700 * MIB) > 700 * MIB
    read = json.loads(found.to_json())
    assert read["least"] == {"level": "block", "precision": "bf16", "bytes": need}


def test_what_is_set_aside(folder):
    """With it, the batches that an H200 was seen to train in the memory of smaller devices."""
    gib = 2**30
    assert allowance_of(12 * gib) == (788 << 20) + round(0.9 * gib)
    found = make_plan(folder, gib, rank=4, precisions=["bf16"], levels=["block"])
    assert found.allowance == allowance_of(gib) and found.batch > 0
    (row,) = found.rows
    assert row.need(row.batch, found.allowance) <= gib < row.need(row.batch + 1, found.allowance)


def test_runs_are_shared_out_to_processes(folder, monkeypatch):
    """In their order. With a function that needs no import; that of the plan takes seconds to be
    there, and what it is given and gives can be sent."""
    monkeypatch.setattr(plans, "run", abs)
    calls = []
    assert plans._all([-3, -1, -2], 2, lambda: calls.append(1)) == [3, 1, 2]
    assert len(calls) == 3
    job = Job(folder, 128, "a3fta", 4, "stock", "bf16", 2)
    for sent in (job, run(job)):
        assert pickle.loads(pickle.dumps(sent)) == sent


def test_a_memory_that_does_not_hold_the_weights_is_refused_at_once(folder):
    with pytest.raises(ValueError, match=r"memory: expected more than the .* of the model's weigh"):
        make_plan(folder, 1024, progress=lambda: pytest.fail("a step was run"))


def test_the_update_can_be_the_peak():
    row = Row("stock", "bf16", 100, 200, 90, 80, per_sample=10, constant=5)
    assert (row.peak(1), row.peak(100)) == (170, 1005)
    assert row.need(1, 7) == 100 + 200 + 170 + 7
