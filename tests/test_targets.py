"""Verdicts on made-up results: met, missed, absent, and what is said about each."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import floors, gpu_stages, step_targets, targets
from benchmarks.workloads import DIRECTIONS, workloads

ABOUT = {
    "device": "Made Up", "capability": "sm_90", "driver": "1", "cuda": "13.0", "torch": "2",
    "triton": "3", "commit": "abc", "date": "today", "quick": False,
}  # fmt: skip
# microseconds: an exact share of the frozen layer's, of the clone's or of eager's
STEP = DIRECTIONS[2]
NORMS = ("group_norm", "layer_norm")
TOTAL = len(targets.TARGETS) + sum(t.device == "cuda" for t in step_targets.TARGETS)


def row(op: str, workload: str, direction: str, variant: str, us: float, **rest) -> dict:
    return {
        "op": op, "workload": workload, "dtype": "bfloat16", "direction": direction,
        "variant": variant, "q50_us": us, **rest,
    }  # fmt: skip


def results(factor: float = 1.0) -> dict:
    """Every row that the targets ask for; ours takes `factor` of what would just meet them."""
    rows = []
    for op in {t.op: None for t in targets.TARGETS}:
        for w, _ in workloads(op, "cuda", quick=False):
            for direction in DIRECTIONS:
                if op not in ("adapter", *NORMS) and direction != STEP:
                    continue
                at = (op, w.name(op), direction)
                for name, us in made_up(op, w, direction, factor).items():
                    rows.append(row(*at, name, us, terms_us={"bytes": 60.0, "launches": 5.0}))
    return {"environment": ABOUT, "rows": rows}


def made_up(op: str, w, direction: str, factor: float) -> dict[str, float]:
    if op == "adapter":
        # at 100, eager's limit is 250, compile's 130; the clone's share is the stricter one's
        share = {"forward": 0.90, "backward": 0.75, STEP: 1.0}[direction]
        ours = 100.0 * factor
        return {
            "auto": ours, "native": ours, "triton": ours, "eager": 250.0, "compile": 130.0,
            "clone": 100.0 * share,
        }  # fmt: skip
    if op == "adapter_linear":
        frozen, read = 80.0, 12.0
        ours = 1.10 * (floors.arithmetic_ratio(w) * frozen + read)
        # eager and peft are as slow as their limits ask for, at this workload
        return {
            "auto": ours * factor, "eager": 1.6 * ours, "peft": 1.3 * ours, "frozen": frozen,
            "read": read,
        }  # fmt: skip
    if op in NORMS:
        return {"auto": 100.0 * factor, "eager": 150.0, "clone": 75.0}
    if op == "block":
        return {"auto": 110.0 * factor, "eager": 150.0, "frozen": 100.0}
    return {"auto": 100.0 * factor, "eager": 170.0, "frozen": 90.0}


def verdicts(found: dict) -> dict[str, targets.Verdict]:
    return {v.target.name: v for v in targets.judge(found)}


def test_all_met_just_below_the_limit():
    found = verdicts(results(0.999))
    assert {v.state for v in found.values()} == {"met"}
    assert all(v.said() == "met" and not v.missing for v in found.values())


def test_all_missed_and_by_how_much():
    found = verdicts(results(1.2))
    for name, v in found.items():
        # Triton's two-pass backward may take longer
        if name.startswith("adapter backward, triton"):
            assert v.state == "met"
        else:
            assert v.said() == "missed: 20% too slow", name


def test_nothing_measured_is_no_number():
    for nothing in ({"environment": ABOUT, "rows": []}, {"environment": {}, "rows": []}):
        found = targets.judge(nothing)
        assert {v.state for v in found} == {"not measured"}
        for v in found:
            assert v.deciding is None and v.found().startswith("0 of ")
        text = "\n".join(targets.report(nothing | {"environment": ABOUT}, found))
        assert f"0 met, 0 missed, {TOTAL} not measured" in text
        assert "µs" not in text  # no table of workloads


def test_rows_of_a_cpu_or_of_another_dtype_do_not_count():
    found = results(0.9)
    cpu = {k: v for k, v in ABOUT.items() if k != "capability"}
    assert {v.state for v in targets.judge(found | {"environment": cpu})} == {"not measured"}
    wide = [r | {"dtype": "float16"} for r in found["rows"]]
    assert {v.state for v in targets.judge(found | {"rows": wide})} == {"not measured"}


def test_a_part_is_not_the_whole():
    found = results(0.9)
    name = workloads("block", "cuda", False)[0][0].name("block")
    found["rows"] = [r for r in found["rows"] if r["workload"] != name]
    block = next(v for v in targets.judge(found) if v.target.op == "block")
    assert block.state == "not measured" and block.missing == [name]
    assert block.found().endswith("5 of 6 workloads")
    text = "\n".join(targets.report(found, targets.judge(found)))
    assert f"| {name} | | not measured |" in text

    # one workload beyond the limit misses a target for each, whatever else is missing
    for r in found["rows"]:
        if r["op"] == "block" and r["variant"] == "auto":
            r["q50_us"] = 140.0
    block = next(v for v in targets.judge(found) if v.target.op == "block")
    assert block.state == "missed"


def test_each_means_each_and_a_mean_is_a_mean():
    found = results(0.95)
    slow = workloads("adapter_linear", "cuda", False)[0][0].name("adapter_linear")
    for r in found["rows"]:
        if (r["op"], r["workload"], r["variant"]) == ("adapter_linear", slow, "auto"):
            r["q50_us"] *= 1.2
    each, eager, peft = (
        next(
            v
            for v in targets.judge(found)
            if v.target.op == "adapter_linear" and x in v.target.name
        )
        for x in ("time over", "than eager", "than peft")
    )
    assert each.state == "missed" and each.worst == slow
    assert each.said() == "missed: 14% too slow" and slow in each.found()
    assert eager.state == peft.state == "met"


def test_the_formula_of_the_frozen_layer():
    w = workloads("adapter_linear", "cuda", False)[0][0]
    rows = {"frozen": {"q50_us": 100.0}, "read": {"q50_us": 10.0}}
    value = targets.of_the_least({"q50_us": 150.0}, rows, w)
    c, r, m = w.c, w.r, w.m
    assert value == pytest.approx(150 / ((1 + 3 * r / c + r / m) * 100 + 10))
    assert targets.of_the_least({"q50_us": 150.0}, {"frozen": {"q50_us": 1.0}}, w) is None


def test_what_is_judged():
    judged = {t.name.partition(":")[0]: t for t in targets.TARGETS}

    def names(target: targets.Target) -> set[str]:
        return {
            w.name(target.op) for w, _ in workloads(target.op, "cuda", False) if target.judged(w)
        }

    share = names(judged["adapter forward, native"])
    assert "16384x640-r64" in share and "4096x1280-r64" not in share
    least = names(next(t for t in targets.TARGETS if t.value is targets.of_the_least))
    assert {"16384x640-r64", "4096x1280-r16", "4608x15360to3072-r64"} <= least
    assert not any(n.startswith(("16384x320", "4096x640", "512x")) for n in least)
    assert len(names(judged["transformer block"])) == 6


def test_flux_single_blocks_are_said_to_be_capped():
    found = results(0.999)
    eager = next(v for v in targets.judge(found) if v.target.name.endswith("than eager") and
                 v.target.op == "adapter_linear")  # fmt: skip
    assert "without Flux's single blocks" in eager.found() and targets.CAPPED in eager.found()
    text = "\n".join(targets.report(found, [eager]))
    (line,) = [x for x in text.splitlines() if x.startswith("| 4608x15360to3072-r64 |")]
    assert targets.CAPPED in line


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"bytes": 80.0, "arithmetic": 20.0, "launches": 3.0}, "bytes, 80% of the time"),
        ({"bytes": 8.0, "arithmetic": 60.0, "launches": 3.0}, "arithmetic, 60% of the time"),
        ({"bytes": 8.0, "arithmetic": 20.0, "launches": 70.0}, "launches, 70% of the time"),
        (
            {"bytes": 30.0, "arithmetic": 20.0},
            "occupancy or latency (of terms: bytes, 30% of the time)",
        ),
        ({}, "no terms recorded"),
    ],
)
def test_what_bounds_a_row(terms, said):
    assert targets.bound({"q50_us": 100.0, "terms_us": terms}) == said


def test_a_faster_path_is_named_and_a_rival_is_not_a_path():
    auto, rows = {"q50_us": 100.0}, {"frozen": {"q50_us": 10.0}, "peft": {"q50_us": 50.0}}
    assert targets.faster(auto, rows | {"auto": auto, "native-fused": {"q50_us": 99.0}}) == ""
    said = targets.faster(auto, rows | {"auto": auto, "native-fused": {"q50_us": 80.0}})
    assert said == "native-fused takes 0.80 of it"


def test_where_there_is_no_choice_the_one_path_is_ours():
    rows = {"eager": row("adapter", "w", "forward", "eager", 2.0)}
    assert targets.ours_of(rows) is None
    rows["triton"] = row("adapter", "w", "forward", "triton", 1.0)
    assert targets.ours_of(rows) is rows["triton"]
    rows["native"] = row("adapter", "w", "forward", "native", 1.0)
    assert targets.ours_of(rows) is None  # which of them a user gets is not known
    rows["auto"] = row("adapter", "w", "forward", "auto", 1.0)
    assert targets.ours_of(rows) is rows["auto"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it reads the file of the GPU at hand")
def test_files_in_and_out(tmp_path, capsys):
    found = results(0.999)
    found["rows"][0] |= {"direction": STEP, "enqueue_us": 42.0, "counts": {"kernels": 7}}
    (tmp_path / "made-up.json").write_text(json.dumps(found))
    (tmp_path / "cpu.json").write_text(json.dumps(found | {"environment": {"quick": False}}))
    (tmp_path / "aot_triton.json").write_text("[]")
    for name in ("inference", "largest"):  # they have no targets
        other = json.dumps({"environment": found["environment"], "rows": [{"model": "SDXL"}]})
        (tmp_path / f"{name}_made-up.json").write_text(other)
    assert targets.main(["--results", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "made-up-targets.md").read_text()
    assert written == printed and written.startswith("# Targets on Made Up\n")
    assert "driver 1, cuda 13.0, torch 2, triton 3, commit abc, date today." in written
    assert "| adapter | 16384x640-r64 | auto | 99.9 | 7 | 42 |" in written
    assert not (tmp_path / "cpu-targets.md").exists()
    counts, wrong = gpu_stages.read_targets(printed)
    assert not wrong and sum(counts.values()) == TOTAL
    assert counts["missed"] == 0 and counts["met"] > 0

    assert targets.main(["--results", str(tmp_path), "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "no results yet" in printed
    assert gpu_stages.read_targets(printed)[0] == {
        "met": 0, "missed": 0, "not measured": TOTAL
    }  # fmt: skip
    assert gpu_stages.read_targets("Traceback")[1] == "the targets were not reported"


def test_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        targets.main(["--results", str(tmp_path / "none")])
    assert "--results: expected a folder, got" in capsys.readouterr().err
