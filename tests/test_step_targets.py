"""Verdicts on made-up training steps."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import step_targets, targets
from benchmarks.step_methods import CHECKPOINTING, COMPILE, FUSED, LEVELS, STOCK, Cell

from .step_results import ANCHOR, LORA, MIB, results
from .step_results import FUSED as OURS


def verdicts(found: dict | None, device: str) -> dict[str, step_targets.StepVerdict]:
    return {v.target.name: v for v in step_targets.judge(found, device)}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_what_is_fast_and_small_enough_meets_every_target(device):
    found = verdicts(results(device), device)
    assert {n: v.state for n, v in found.items() if v.state != "met"} == {}
    text = step_targets.table(results(device), device, list(found.values()))
    assert ("(CPU)" in text[3]) is (device == "cpu") and "commit abc" in text[3]


def scaled(found: dict, cell: Cell, time: float = 1.0, peak: float = 1.0) -> dict:
    """A cell takes longer in every loop, and more memory."""
    for row in found["rows"]:
        if str(cell) in row["beside"]:
            row["beside"][str(cell)] *= time
        if (row["method"], row["variant"]) == cell:
            row["q50_us"] *= time
            row["peak_bytes"] *= peak
            if row["predicted_bytes"]:
                row["predicted_bytes"] *= peak
    return found


def test_a_peak_that_was_not_predicted_is_missed():
    found = results("cuda")
    name = "step, peak: share off the prediction"
    row = next(r for r in found["rows"] if (r["method"], r["variant"]) == (OURS, "block"))
    row["predicted_bytes"] = 1.06 * row["peak_bytes"]
    assert verdicts(found, "cuda")[name].state == "missed"
    row["predicted_bytes"] = row["peak_bytes"] / 1.07
    assert "0.07" in verdicts(found, "cuda")[name].found()
    for row in found["rows"]:
        row["predicted_bytes"] = None
    assert verdicts(found, "cuda")[name].state == "not measured"


def test_each_target_is_missed_by_what_it_names():
    def missed(cell: Cell, device: str = "cuda", **factors: float) -> set[str]:
        found = verdicts(scaled(results(device), cell, **factors), device)
        return {n.removeprefix("step, ") for n, v in found.items() if v.state == "missed"}

    slow = missed(Cell(OURS, "exact"), time=1.3)
    assert slow == {"exact: time over PEFT LoRA, eager", "exact: time over PEFT LoRA, compiled",
                    "exact: time over the stock trunk"}  # fmt: skip
    assert missed(Cell(OURS, "exact"), peak=1.5) == {"exact: peak above weights over PEFT LoRA"}
    assert missed(Cell(OURS, "recompute"), time=1.16) == {
        "recompute: time over PEFT LoRA, eager", "recompute: time over the stock trunk"
    }  # fmt: skip
    assert missed(Cell(OURS, "recompute"), peak=1.3) == {"recompute: peak over PEFT LoRA"}
    assert missed(Cell(OURS, CHECKPOINTING), time=0.8, peak=0.7) == {
        "levels that checkpointing dominates", "block: peak over checkpointing",
        "block: time over checkpointing",
    }  # fmt: skip
    assert "exact: time over the stock trunk" in missed(Cell(OURS, "exact"), "cpu", time=1.2)
    assert missed(Cell(OURS, "recompute"), "cpu", time=1.1) == {
        "recompute: time over the stock trunk"
    }


def test_the_faster_of_the_two_loras_is_the_rival():
    found = scaled(results("cuda"), ANCHOR, time=5.0)
    v = verdicts(found, "cuda")["step, exact: time over PEFT LoRA, eager"]
    assert v.values["SDXL 1024x1024, batch 4"] == pytest.approx(0.88 * 0.8)


def test_eight_gib_are_weights_and_peak_of_the_smallest_level():
    found = results("cuda")
    v = verdicts(found, "cuda")["step, weights and peak in GiB, smallest level"]
    assert v.values["SDXL 1024x1024, batch 1"] == pytest.approx(
        (5000 + 5000 * 0.95 * 0.15) * MIB / 2**30
    )
    for row in found["rows"]:
        row["weights_bytes"] *= 2
    assert verdicts(found, "cuda")[v.target.name].state == "missed"


def test_times_of_two_loops_are_not_compared():
    found = results("cuda")
    rows = {Cell(r["method"], r["variant"]): r for r in found["rows"] if r["batch_size"] == 4
            and r["model"].startswith("SDXL")}  # fmt: skip
    compiled, exact = Cell(LORA, COMPILE), Cell(FUSED, "exact")
    # exact's own row is of the first loop: the ratio is that of the loop of the compiled ones
    rows[compiled]["beside"][str(exact)] = 3 * rows[compiled]["beside"][str(compiled)]
    assert step_targets.times_as_long(rows, exact, compiled) == pytest.approx(3)
    full = Cell("full fine-tuning", STOCK)
    assert step_targets.times_as_long(rows, exact, full) is None


def test_nothing_measured_is_no_number():
    for device in ("cuda", "cpu"):
        other = "cpu" if device == "cuda" else "cuda"
        for nothing in (None, results(other)):
            found = verdicts(nothing, device)
            assert {v.state for v in found.values()} == {"not measured"}
    part = results("cuda")
    part["rows"] = [r for r in part["rows"] if r["variant"] != next(iter(LEVELS))]
    v = verdicts(part, "cuda")["step, levels that checkpointing dominates"]
    assert v.state == "not measured" and len(v.missing) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it reads the file of the GPU at hand")
def test_targets_read_the_steps(tmp_path, capsys):
    (tmp_path / "step_made-up.json").write_text(json.dumps(results("cuda")))
    (tmp_path / "step_cpu.json").write_text(json.dumps(results("cpu")))
    assert targets.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    gpu, cpu = ((tmp_path / f"{s}-targets.md").read_text() for s in ("made-up", "cpu"))
    assert printed == cpu + gpu and "# Targets on Made Up (CPU)\n" in cpu
    count = sum(t.device == "cuda" for t in step_targets.TARGETS)
    assert f"targets: {count} met, 0 missed, {len(targets.TARGETS)} not measured" in gpu
