"""The page of results: what it shows, what it says is missing, and that no label hides another."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import report, report_figures
from benchmarks.step_methods import ANCHOR, FUSED, STOCK, Cell

from .step_results import ABOUT, ON_GPU, results

OPS = [
    {"op": op, "workload": w, "dtype": dtype, "direction": "forward+backward", "variant": v,
     "q50_us": us}
    for op in ("adapter", "geglu") for w in ("a", "b") for dtype in ("float32", "bfloat16")
    for v, us in (("eager", 100.0), ("native", 40.0 if w == "a" else 90.0), ("clone", 20.0))
] + [
    {"op": "quantize", "workload": "a", "dtype": dtype, "direction": "forward", "variant": v,
     "q50_us": us}
    for dtype in ("float32", "bfloat16") for v, us in (("eager", 100.0), ("native", 50.0))
]  # fmt: skip
CALLS = [
    {"model": "SDXL", "batch_size": 4, "dtype": "float32", "cell": cell, "rounds": 5,
     "q20_us": us - 1e3, "q50_us": us, "q80_us": us + 1e3, "of_frozen": us / 1e5,
     "images_per_second": 4e6 / 30 / us, "peak_bytes": 3 << 20, "counts": {"operators": 7}}
    for cell, us in (("frozen base", 1e5), ("PEFT LoRA r16", 1.5e5), ("A3FTA r64", 1.2e5))
]  # fmt: skip
LARGEST = {
    "rows": [{"model": "SDXL", "gib": 24, "level": "block", "batch": 21, "largest": 22,
              "peak_bytes": 22 << 30, "context_bytes": 500 << 20}],
    "absent": [{"model": "SDXL", "gib": 24, "level": "exact", "reason": "made up"}],
}  # fmt: skip
CALLS_ABSENT = [
    {"model": "SD1.5", "batch_size": 4, "cell": "frozen base", "reason": "the minutes were over"},
    {"model": "SDXL", "batch_size": 4, "cell": "A3FTA r64, merged", "reason": "made up"},
]
SAVED = {
    "environment": {"commit": "abc", "torch": "2"}, "dtype": "bfloat16", "batch": 1,
    "rows": [
        {"model": "SDXL", "method": "PEFT LoRA r16 on q, k, v, out in bf16", "level": level,
         "saved_bytes": size << 30}
        for level, size in (("checkpointing", 1), ("stock", 4))
    ] + [
        {"model": "SDXL", "method": "A3FTA r64, backend native", "level": "exact",
         "saved_bytes": 3 << 30, "peak_bytes": 5 << 30},
    ],
}  # fmt: skip


def page(folder: Path, **files) -> str:
    source = folder / "results"
    source.mkdir(exist_ok=True)
    for path in source.glob("*.json"):
        path.unlink()
    for name, data in files.items():
        (source / f"{name}.json").write_text(json.dumps(data))
    out = folder / "REPORT.md"
    assert report.main(["--results", str(source), "--out", str(out)]) == 0
    return out.read_text()


def pictures(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "figures").glob("*.png"))}


def test_the_whole_page(tmp_path):
    found = {
        "step_cpu": results("cpu"), "step_made-up": results("cuda"), "saved_bytes": SAVED,
        "cpu": {"environment": ABOUT, "rows": OPS},
        "made-up": {"environment": ABOUT | ON_GPU, "rows": OPS},
        "largest_made-up": {"environment": ABOUT | ON_GPU} | LARGEST,
        "inference_cpu": {"environment": ABOUT, "rows": CALLS, "absent": CALLS_ABSENT},
        "inference_made-up": {
            "environment": ABOUT | ON_GPU, "rows": CALLS, "absent": CALLS_ABSENT
        },
    }  # fmt: skip
    text = page(tmp_path, **found)
    assert "Missing" not in text
    names = set(pictures(tmp_path))
    assert names == {part.partition(")")[0] for part in text.split("(figures/")[1:]}
    assert len(names) == 5 + 2 + 1 + 2 + 3
    # of three models on a GPU; a loop that had no graph has no such picture
    graphs = [name for name in names if name.endswith("-graph.png")]
    assert len(graphs) == 3 and all(name.startswith("step-made-up") for name in graphs)
    # a GPU's results first; a CPU is called a CPU in every section
    assert text.index("on Made Up") < text.index("on CPU")
    assert text.count("commit abc") >= 8
    # who wins: the made-up exact is fastest without the compiler, 0.8 * 0.88
    assert "- Fastest: **A3FTA · exact**, 0.70 of PEFT LoRA's time with 0.63 of its memory." in text
    assert "- Smallest: **A3FTA · block-int8**, 0.14 of the memory" in text
    numbers = "1000 | 970 to 1050 | 1.00 | 5,000 | 4,000 | 1000 | 3.00"
    assert f"| PEFT LoRA r16 · stock | {numbers} |" in text
    # a GPU's peak stands beside the prediction
    assert "| 1.00 | 5,000 | 5,200 | 4,000 | 1000 | 3.00 |" in text
    assert "| step, peak: share off the prediction | <= 0.05 | 0.04 (SDXL" in text
    assert "| SDXL, 24 GiB | block | 21 | 22 | 22,528 | 500 |" in text
    assert "- SDXL, 24 GiB, exact: made up" in text
    # geometric mean of 0.4 and 0.9
    assert "| adapter | ours, native | 0.60 | 2 |" in text
    assert "| quantize | ours, native | 0.50 | 1 |" in text
    assert "| A3FTA r64 | 120.0 | 119.0 to 121.0 | 1.20 | 1.11 | 3 | 7 |" in text
    assert text.count("- A3FTA r64, merged: made up") == 2
    assert text.count("- frozen base: the minutes were over") == 2
    assert "| A3FTA r64 · exact | 3,072 | 0.75 | 5,120 |  |" in text
    assert "| PEFT LoRA r16, bf16 · checkpointing | 1,024 | 0.25 |  |  |" in text
    assert "| step, exact: time over the stock trunk | <= 0.90 | 0.88" in text


def test_the_same_results_give_the_same_bytes(tmp_path):
    found = {"step_cpu": results("cpu"), "saved_bytes": SAVED}
    first = page(tmp_path, **found), pictures(tmp_path)
    assert (page(tmp_path, **found), pictures(tmp_path)) == first and len(first[1]) == 3


def test_what_is_missing_is_named_and_the_rest_is_drawn(tmp_path):
    text = page(tmp_path)
    assert text.count("on a GPU: none measured (") == 3
    for script in ("bench_step.py", "run.py", "bench_inference.py", "count_saved"):
        assert script in text
    assert not pictures(tmp_path)
    text = page(tmp_path, step_cpu=results("cpu"))
    assert "training steps on a GPU: none measured" in text and len(pictures(tmp_path)) == 2
    assert "- PEFT LoRA r16 · compile: made up" in text
    assert "Made Up, driver" not in text and "CPU: Made Up, 2 threads" in text
    # pictures of results that are gone go too
    page(tmp_path, saved_bytes=SAVED)
    assert set(pictures(tmp_path)) == {"saved-sdxl.png"}


def test_a_busy_cpu_is_called_busy(tmp_path):
    found = results("cpu")
    assert "other work" not in page(tmp_path, step_cpu=found)
    found["environment"] = found["environment"] | {"load": 3.2}
    assert page(tmp_path, step_cpu=found).count("other work beside (load 3.2)") == 2


def test_quick_results_do_not_count(tmp_path):
    found = results("cpu")
    found["environment"] = found["environment"] | {"quick": True}
    assert "training steps on a CPU: `python" in page(tmp_path, step_cpu=found)


def test_where_ours_loses_it_says_so(tmp_path):
    found = results("cpu")
    for row in found["rows"]:
        row["beside"] = row["beside"] | {f"{FUSED} | exact": 2e6}
        if (row["method"], row["variant"]) == (FUSED, "exact"):
            row["peak_bytes"] *= 2
    text = page(tmp_path, step_cpu=found)
    assert "- **A3FTA · exact** loses, in time and memory, to LoRA, LoRA, as many" in text


def test_without_a_comparison_there_is_no_picture(tmp_path):
    found = results("cpu")
    for row in found["rows"]:
        row["beside"].pop(str(ANCHOR))
    text = page(tmp_path, step_cpu=found)
    assert not pictures(tmp_path) and f"| {FUSED} · exact | 704 |" in text


@pytest.mark.parametrize("seed", range(1, 7))
def test_labels_hide_nothing(tmp_path, seed):
    for rows in report.by_model(results("cuda", seed)).values():
        placed = report.points(rows)
        boxes = report_figures.scatter(tmp_path / "one.png", "title", "source", placed, 0.5)
        assert len(boxes) == len(placed) >= 20
        for a, b in itertools.combinations(boxes, 2):
            assert report_figures.overlap(a, b) == 0


def test_the_front_is_what_nothing_dominates():
    (rows,) = list(report.by_model(results("cpu")).values())[:1]
    placed = {p.label: p for p in report.points(rows)}
    front = {p.label for p in placed.values() if p.front}
    assert {"A3FTA · exact", "A3FTA · block-int8"} <= front
    assert not front & {"LoRA", "full", "A3FTA · checkpointing", "A3FTA in eager"}
    for p in placed.values():
        beaten = any(q.x <= p.x and q.y <= p.y and q[1:3] != p[1:3] for q in placed.values())
        assert p.front is not beaten
    assert report.label(Cell(FUSED, STOCK)) == "A3FTA"


def test_a_folder_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path / "none")])
    assert "--results: expected a folder, got" in capsys.readouterr().err
