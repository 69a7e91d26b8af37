"""`predict_step.py` and `bench_largest.py`: predictions that hold where they can be measured here,
and the search for the largest batch."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest
import torch

pytest.importorskip("diffusers")

from a3fta_kernels.backends import native_status
from benchmarks import bench_largest, predict_step, step_models
from benchmarks.bench_largest import largest
from benchmarks.step_measure import Limits, measure_batch
from benchmarks.step_methods import (
    ANCHOR,
    COMPILE,
    FULL,
    FUSED,
    GRAPH,
    STOCK,
    XFORMERS,
    Batch,
    Cell,
    batches,
)  # fmt: skip

(TINY,) = step_models.QUICK
READY = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None or not native_status().available,
    reason="needs peft and the compiled library",
)


@READY
def test_peaks_are_those_of_steps_that_run(monkeypatch):
    cells = (ANCHOR, *(Cell(FUSED, v) for v in (STOCK, "exact", "block-int8")), Cell(FULL, STOCK))
    monkeypatch.setattr(predict_step, "DTYPE", torch.float32)
    monkeypatch.setattr(predict_step, "batches", lambda _: (Batch("some", cells),))
    predicted = {Cell(r["method"], r["variant"]): r["peak_bytes"] for r in predict_step.peaks(TINY)}
    device = torch.device("cpu")
    trunk = TINY.trunk(device, torch.float32)
    limits = Limits(0.0, 1, time.perf_counter() + 600)
    rows = measure_batch(TINY, trunk, Batch("some", cells), device, limits).rows
    assert list(predicted) == list(cells)
    for cell, row in rows.items():
        # the moments' counters of steps, and at this size some padding, are no tensors of the step
        assert predicted[cell] == pytest.approx(row["peak_bytes"], rel=0.02), str(cell)


def test_what_no_fake_tensor_sees_is_not_predicted():
    cells = {cell for batch in batches("cuda") for cell in batch.cells}
    left = {cell for cell in cells if not predict_step.countable(cell)}
    assert {cell.variant.rpartition(", ")[2] for cell in left if "floor" not in cell.method} == {
        COMPILE, GRAPH, XFORMERS
    }  # fmt: skip


@READY
def test_the_file(monkeypatch, tmp_path, capsys):
    row = {"model": "m", "batch_size": 1, "method": "a", "variant": "b", "peak_bytes": 5}
    monkeypatch.setattr(predict_step, "peaks", lambda model: [row | {"model": model.name}])
    monkeypatch.setattr(predict_step, "largest", lambda case: [{"gib": case.gib}])
    path = tmp_path / "predicted.json"
    assert predict_step.read(path) == {"rows": [], "largest": []}
    assert predict_step.main(["--out", str(path)]) == 0
    found = predict_step.read(path)
    assert [r["model"] for r in found["rows"]] == [m.name for m in step_models.GPU]
    assert [r["gib"] for r in found["largest"]] == [12, 24]
    assert found["environment"]["commit"]


@pytest.mark.parametrize(
    "predicted, most, found",
    [(10, 10, 10), (10, 12, 12), (10, 7, 7), (10, 0, 0), (0, 0, 0), (0, 2, 2), (64, 71, 70),
     (64, 61, 60), (1, 1, 1)],
)  # fmt: skip
def test_the_search_for_a_batch(predicted, most, found):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= most

    assert largest(predicted, fits) == found
    assert min(tried) >= 1 and len(set(tried)) == len(tried)


def test_every_case_is_named(capsys):
    assert bench_largest.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names[0] == "SD1.5 512x512, 12 GiB | stock" and len(names) == 6
    assert bench_largest.main(["--list", "--quick", "--only", "SDXL"]) == 0
    assert capsys.readouterr().out.splitlines() == ["SDXL 1024x1024, 24 GiB | exact"]
    with pytest.raises(SystemExit):
        bench_largest.main(["--list", "--only", "SD9"])
    assert "no case is left" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_largest.main(["--device", "cpu"])
    assert "--device: expected cuda, whose memory it fills, got cpu" in capsys.readouterr().err


def test_a_case_that_fails_is_named_and_the_others_are_measured(monkeypatch, tmp_path, capsys):
    known = [
        {"model": case.model.name, "gib": case.gib, "level": level, "batch": 4}
        for case in predict_step.CASES for level in case.levels if level != "block-int8"
    ]  # fmt: skip
    monkeypatch.setattr(predict_step, "read", lambda: {"rows": [], "largest": known})

    def measured(case, level, predicted, device):
        if level == "stock":
            raise RuntimeError("made up")
        return {"largest": predicted + 1, "peak_bytes": 1, "context_bytes": 2}

    monkeypatch.setattr(bench_largest, "measured", measured)
    monkeypatch.setattr(bench_largest, "parsed", on_cpu)
    assert bench_largest.main(["--out", str(tmp_path), "--commit", "abc"]) == 1
    found = json.loads((tmp_path / "largest_cpu.json").read_text())
    assert [row["largest"] for row in found["rows"]] == [5] * 4
    assert {row["level"]: row["reason"] for row in found["absent"]} == {
        "stock": "failed: RuntimeError: made up",
        "block-int8": "not predicted: python -m benchmarks.predict_step",
    }
    assert "SD1.5 512x512, 12 GiB | exact: batch 5, predicted 4" in capsys.readouterr().out


def on_cpu(parser, arguments):
    return parser.parse_args(arguments), torch.device("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fills a GPU")
def test_a_small_memory_is_filled(monkeypatch):
    case = predict_step.Case(TINY, "tiny", 4, ("exact",))
    found = bench_largest.measured(case, "exact", 4000, torch.device("cuda"))
    assert found["largest"] > 0 and 0 < found["peak_bytes"] < 4 * predict_step.GIB


def test_only_a_lack_of_memory_says_that_a_batch_is_too_large(monkeypatch):
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 7)
    case, device = predict_step.Case(TINY, "tiny", 2, ("exact",)), torch.device("cpu")
    trunk = TINY.trunk(device, torch.float32)
    monkeypatch.setattr(bench_largest, "DTYPE", torch.float32)
    assert bench_largest.peak_of(case, "exact", 2, trunk, device) == 7
    for error, found in (
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), None),
        (RuntimeError("GET was unable to find an engine to execute this computation"), None),
        (RuntimeError("an illegal memory access was encountered"), "raised"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(bench_largest, "build", fail)
        if found is None:
            assert bench_largest.peak_of(case, "exact", 2, trunk, device) is None
        else:
            with pytest.raises(RuntimeError, match="illegal"):
                bench_largest.peak_of(case, "exact", 2, trunk, device)
