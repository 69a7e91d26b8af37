"""The benchmark harness on a workload of no size: what it checks, counts and writes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import harness, measure, run
from benchmarks.workloads import CPU, DIRECTIONS, GPU, OPS, Workload

TINY = Workload("none", 1, 48, 24, r=4, residual=True)


@pytest.fixture
def settings(device, monkeypatch):
    monkeypatch.setattr(harness, "workloads", lambda *_: [(TINY, torch.float32)])
    return harness.Settings(device, quick=True, minutes=5.0, seconds=0.0)


def group(op: str, direction: str) -> harness.Group:
    return harness.Group(op, TINY, torch.float32, direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("op", OPS)
def test_every_variant_is_measured(settings, op, direction):
    found = harness.measure_group(group(op, direction), settings)
    wanted = {e.variant for e in harness.entries(op, settings) if e.group == group(op, direction)}
    assert set(found) == wanted >= {"eager"}
    for name, result in found.items():
        assert "error" not in result, (name, result)
        assert len(result["samples"]) >= 7 and min(result["samples"]) > 0
    if direction == "forward+backward":
        rows = TINY.m * 4
        # h, a and z in eager; the op keeps h and a
        assert found["eager"]["saved_bytes"] >= rows * (TINY.c + 2 * TINY.r)


def test_a_wrong_variant_is_an_error_and_hides_no_other(settings, monkeypatch):
    plain = harness.variants

    def variants(*arguments):
        return plain(*arguments) | {"wrong": lambda h, **_: h + 1}

    monkeypatch.setattr(harness, "variants", variants)
    found = harness.measure_group(group("adapter", "forward"), settings)
    assert "AssertionError" in found["wrong"]["error"] and "samples" in found["eager"]


def test_no_group_starts_when_the_time_is_over(settings):
    settings.minutes = -1.0
    entry = harness.entries("adapter", settings)[0]
    with pytest.raises(pytest.skip.Exception, match="not measured"):
        harness.Runner(settings).result(entry)


def test_counts_see_operators_and_not_views():
    x = torch.randn(8, 8)
    assert measure.count(lambda i: x.t() @ x, torch.device("cpu")) == {"operators": 1}
    assert measure.count(lambda i: (x + 1).relu(), torch.device("cpu")) == {"operators": 2}


def test_saved_bytes_counts_each_storage_once_and_no_weight():
    h, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: (h @ w) + (h @ w), [w]) == h.nbytes


def test_work_of_a_workload():
    w = Workload("none", 2, 8, 4, r=2)
    assert w.flop("adapter", "forward") == 4 * 16 * 4 * 2
    assert w.flop("adapter", "forward+backward") == 3 * w.flop("adapter", "forward")
    assert w.bytes("adapter", "forward", torch.float32) == (2 * 16 * 4 + 2 * 4 * 2) * 4
    half = w.bytes("adapter_linear", "forward+backward", torch.bfloat16)
    assert half * 2 == w.bytes("adapter_linear", "forward+backward", torch.float32)


@pytest.mark.parametrize("op", OPS)
def test_names_of_workloads_differ(op):
    for shapes in (CPU, GPU):
        wanted = [w for w in shapes if op == "adapter_linear" or not (w.residual or w.k)]
        assert len({w.name(op) for w in wanted}) == len(wanted)


def test_ratios_and_file(tmp_path):
    row = {"op": "adapter", "workload": "w", "dtype": "float32", "direction": "forward"}
    rows = run.ratios(
        [
            row | {"variant": "eager", "q50_us": 10.0, "floor_us": 2.0},
            row | {"variant": "native", "q50_us": 5.0, "floor_us": 2.0},
            row | {"variant": "clone", "q50_us": 1.0},
        ]
    )
    assert [r["x_eager"] for r in rows] == [1.0, 2.0, 10.0]
    assert rows[1]["of_floor"] == 0.4 and "of_floor" not in rows[2]
    environment = {"device": "d", "commit": "c", "torch": "t", "quick": False}
    found = {"environment": environment, "ceilings": {"copy_bytes_per_s": 1e9}, "rows": rows}
    path = tmp_path / "d.json"
    run.write(path, found)
    assert json.loads(path.read_text()) == found

    linear = found | {"rows": [rows[0] | {"op": "adapter_linear"}]}
    assert [r["op"] for r in run.merged(path, linear, "adapter_linear")["rows"]] == [
        "adapter", "adapter", "adapter", "adapter_linear"
    ]  # fmt: skip
    other = linear | {"environment": environment | {"commit": "another"}}
    assert run.merged(path, other, "adapter_linear") == other
