"""Results as a page with pictures: `python -m benchmarks.report [--results DIR] [--out FILE]`.

Reads results/*.json and writes REPORT.md and figures/*.png beside it. Every table and picture says
device, versions and commit; what was not measured is named. The same results give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from . import report_figures as figures
from . import report_inference, report_memory, step_targets
from .report_figures import Bar, Point
from .report_text import MIB, mib, place, slug, source
from .step_methods import (
    ANCHOR,
    BESIDE,
    CHECKPOINTING,
    EAGER,
    EQUAL,
    FLOOR,
    FULL,
    FUSED,
    GRAPH,
    LEVELS,
    LORA,
    STOCK,
    Cell,
)
from .workloads import BENCHES

HERE = Path(__file__).parent
STEP = "forward+backward"
SHORT = {FUSED: "A3FTA", BESIDE: "A3FTA beside attention", EAGER: "A3FTA in eager", LORA: "LoRA",
         EQUAL: "LoRA, as many parameters", FULL: "full"}  # fmt: skip
KINDS = {
    FUSED: "A3FTA",
    BESIDE: "A3FTA",
    EAGER: "A3FTA",
    LORA: "PEFT LoRA",
    EQUAL: "PEFT LoRA",
    FULL: FULL,
}
RIVAL_KINDS = ("PEFT LoRA", FULL)
RIVALS = {"eager": "eager PyTorch", "compile": "torch.compile", "peft": "PEFT LoRA",
          "frozen": "frozen layer alone", "clone": "copy of the same bytes"}  # fmt: skip

Found = dict[str, Any]
Row = dict[str, Any]


def label(cell: Cell) -> str:
    return SHORT[cell.method] if cell.variant == STOCK else f"{SHORT[cell.method]} · {cell.variant}"


def kind(cell: Cell) -> str:
    lean = cell.method in (LORA, EQUAL) and cell.variant.split(",")[0] in LEVELS
    return "PEFT LoRA, lean trunk" if lean else KINDS[cell.method]


def by_model(step: Found) -> dict[str, dict[Cell, Row]]:
    found: dict[str, dict[Cell, Row]] = {}
    for row in step["absent"]:
        found.setdefault(f"{row['model']}, batch {row['batch_size']}", {})
    for row in step["rows"]:
        name = f"{row['model']}, batch {row['batch_size']}"
        found.setdefault(name, {})[Cell(row["method"], row["variant"])] = row
    return found


def over_lora(cell: Cell, row: Row) -> float | None:
    """Time over PEFT LoRA's, both of one loop."""
    beside = row["beside"]
    return beside[str(cell)] / beside[str(ANCHOR)] if str(ANCHOR) in beside else None


def points(rows: dict[Cell, Row]) -> list[Point]:
    """Cells with a time and a peak; those that nothing dominates are the front."""
    base = rows.get(ANCHOR, {}).get("peak_bytes")
    placed = {}
    for cell, row in rows.items():
        time, peak = over_lora(cell, row), row.get("peak_bytes")
        if base and peak and time is not None and cell.method != FLOOR:
            placed[cell] = time, peak / base
    return [
        Point(label(cell), x, y, kind(cell),
              not any(a <= x and b <= y and (a, b) != (x, y) for a, b in placed.values()))
        for cell, (x, y) in placed.items()
    ]  # fmt: skip


def step_sections(step: Found, stem: str, out: Path) -> Iterator[str]:
    about = step["environment"]
    on = place(about)
    for model, rows in by_model(step).items():
        yield f"\n## A whole training step: {model}, on {on}\n"
        placed = points(rows)
        if len(placed) > 2:
            name = f"{stem}-{slug(model)}.png"
            floor = rows.get(Cell(FLOOR, STOCK))
            at = over_lora(Cell(FLOOR, STOCK), floor) if floor else None
            title = f"{model}: time and memory of a training step ({on})"
            figures.scatter(out / name, title, source(about, rows.values()), placed, at)
            yield f"![time and memory of a training step of {model}](figures/{name})\n"
            yield "\n".join(said(placed)) + "\n"
        if bars := graph_bars(rows):
            name = f"{stem}-{slug(model)}-graph.png"
            title = f"{model}: training steps as CUDA graphs ({on})"
            axis = "time over PEFT LoRA's, started by Python  (left is faster)"
            figures.bars(
                out / name, title, source(about, rows.values()), [("", bars)], axis, line=1.0
            )
            yield f"![bars: training steps of {model} as CUDA graphs](figures/{name})\n"
        if rows:
            yield from step_table(rows, about)
        absent = [r for r in step["absent"] if f"{r['model']}, batch {r['batch_size']}" == model]
        if absent:
            yield "\nNot measured:\n"
            yield from (f"- {r['method']} · {r['variant']}: {r['reason']}" for r in absent)
    device = step_targets.device_of(step)
    verdicts = step_targets.judge(step, device)
    yield f"\n## Targets of the step, on {on}\n"
    yield "\n".join(step_targets.table(step, device, verdicts)[3:])


def graph_bars(rows: dict[Cell, Row]) -> list[Bar]:
    """All cells of the loop that steps as graphs were timed in; none where there was no such."""
    beside = next((r["beside"] for cell, r in rows.items() if cell.variant.endswith(GRAPH)), {})
    if str(ANCHOR) not in beside:
        return []
    found = []
    for text, time in beside.items():
        cell, ratio = Cell(*text.split(" | ")), time / beside[str(ANCHOR)]
        colour = figures.LORA if cell.method == LORA else figures.OURS
        found.append((label(cell), ratio, colour, f"{ratio:.2f}"))
    return found


def said(placed: list[Point]) -> list[str]:
    """Who wins, and where ours does not."""
    fast, small = min(placed, key=lambda p: p.x), min(placed, key=lambda p: p.y)
    lines = [
        f"- Fastest: **{fast.label}**, {fast.x:.2f} of PEFT LoRA's time with {fast.y:.2f} of its "
        "memory.",
        f"- Smallest: **{small.label}**, {small.y:.2f} of the memory in {small.x:.2f} of the time.",
        f"- Nothing is both faster and smaller than: "
        f"{', '.join(p.label for p in sorted(placed, key=lambda p: p.x) if p.front)}.",
    ]
    for p in placed:
        if p.kind == "A3FTA":
            better = [q.label for q in placed
                      if q.kind in RIVAL_KINDS and q.x <= p.x and q.y <= p.y]  # fmt: skip
            if better:
                lines.append(f"- **{p.label}** loses, in time and memory, to {', '.join(better)}.")
    return lines


def step_table(rows: dict[Cell, Row], about: dict[str, Any]) -> Iterator[str]:
    counted = "kernels" if "capability" in about else "operators"
    predicted = any(row.get("predicted_bytes") for row in rows.values())
    yield (
        "| method · trunk | step, ms | 20 % to 80 % | over LoRA | peak, MiB | "
        f"{'predicted, MiB | ' * predicted}saved, MiB | {counted} | trains, M |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|" + "---:|" * predicted
    for cell, row in rows.items():
        ratio = over_lora(cell, row)
        cells = [
            f"{cell.method} · {cell.variant}", f"{row['q50_us'] / 1e3:.0f}",
            f"{row['q20_us'] / 1e3:.0f} to {row['q80_us'] / 1e3:.0f}",
            "" if ratio is None else f"{ratio:.2f}", mib(row.get("peak_bytes")),
            *([mib(row.get("predicted_bytes"))] if predicted else []), mib(row.get("saved_bytes")),
            str(row.get("counts", {}).get(counted, "")),
            f"{row['trainable_parameters'] / 1e6:.2f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    ways = {r["peak_by"] for r in rows.values() if r.get("peak_by")}
    loops = sorted({r["rounds"] for r in rows.values()})
    yield (
        f"\nPeak above the trunk's weights by {' and '.join(sorted(ways)) or 'nothing'}; medians "
        f"of {' or '.join(map(str, loops))} rounds, every cell one step a round. "
        f"{source(about, rows.values())}.\n"
    )


def op_section(found: Found, stem: str, out: Path) -> Iterator[str]:
    about = found["environment"]
    on, dtype = place(about), "bfloat16" if "capability" in about else "float32"
    panels: list[tuple[str, list[Bar]]] = []
    shown = [r for r in found["rows"] if r["dtype"] == dtype]
    for op in BENCHES:
        bars = op_bars([r for r in shown if r["op"] == op])
        if bars:
            panels.append((op, bars))
    if not panels:
        return
    name = f"ops-{stem}.png"
    title = f"The ops, forward and backward, {dtype} ({on})"
    axis = "time over eager PyTorch's  (left is faster; mean of as many workloads as in brackets)"
    figures.bars(out / name, title, source(about, shown), panels, axis, line=1.0)
    yield f"\n## The ops, on {on}\n"
    yield f"![bars: each op over eager PyTorch](figures/{name})\n"
    yield "| op | variant | time over eager | workloads |"
    yield "|---|---|---:|---:|"
    for op, bars in panels:
        for variant, ratio, _, text in bars:
            yield f"| {op} | {variant} | {ratio:.2f} | {text.partition('(')[2].rstrip(')')} |"
    yield f"\n{source(about, shown)}.\n"


def op_bars(rows: list[Row]) -> list[Bar]:
    """Time over eager's by variant, over the workloads where both were measured."""
    times: dict[str, dict[str, float]] = {}
    # what has no derivative is measured forward alone
    direction = STEP if any(r["direction"] == STEP for r in rows) else "forward"
    for row in rows:
        if row["direction"] == direction:
            times.setdefault(row["variant"], {})[row["workload"]] = row["q50_us"]
    eager = times.pop("eager", {})
    found = []
    for variant, own in times.items():
        if variant in ("read", "sdpa+auto"):
            continue
        ratios = [own[w] / eager[w] for w in own if w in eager]
        if ratios:
            ours = variant not in RIVALS
            name = f"ours, {variant}" if ours else RIVALS[variant]
            colour = figures.OURS if ours else rival_colour(variant)
            found.append((name, geometric_mean(ratios), colour, len(ratios)))
    # ours, rivals, floors
    found.sort(key=lambda b: (b[2] != figures.OURS, b[2] == figures.LIGHT, b[1]))
    return [(n, r, c, f"{r:.2f}  ({count})") for n, r, c, count in found]


def rival_colour(variant: str) -> str:
    if variant == "peft":
        return figures.LORA
    return figures.LIGHT if variant in ("frozen", "clone") else figures.GREY


def saved_section(found: Found, out: Path) -> Iterator[str]:
    about = found["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in about.items())
    where = f"Counted on fake tensors, nothing run; {found['dtype']}, batch {found['batch']}"
    if not found["rows"]:
        return
    yield "\n## What a forward saves for its backward\n"
    yield f"{where}. {versions}.\n"
    for model in dict.fromkeys(r["model"] for r in found["rows"]):
        rows = [r for r in found["rows"] if r["model"] == model]
        base = next((r for r in rows if is_rival(r)), {})
        name = f"saved-{slug(model)}.png"
        bars = [saved_bar(row, base) for row in rows]
        title = f"{model}: bytes saved for the backward"
        figures.bars(out / name, title, f"{where}. {versions}.", [("", bars)],
                     "MiB  (in brackets: over PEFT LoRA's in bf16)")  # fmt: skip
        yield f"![bars: bytes saved for backward, {model}](figures/{name})\n"
        yield f"| {model} | saved, MiB | over LoRA | peak, MiB | over LoRA |"
        yield "|---|---:|---:|---:|---:|"
        for row in rows:
            sizes = [f"{mib(row.get(k))} | {over(row, base, k)}" for k in SIZES]
            yield f"| {saved_label(row)} | {' | '.join(sizes)} |"
        yield ""


SIZES = ("saved_bytes", "peak_bytes")


def over(row: Row, base: Row, size: str) -> str:
    return f"{row[size] / base[size]:.2f}" if row.get(size) and base.get(size) else ""


def saved_bar(row: Row, base: Row) -> Bar:
    size, ratio = row["saved_bytes"], over(row, base, "saved_bytes")
    colour = figures.LORA
    if not row["method"].startswith("PEFT"):
        # the frozen trunk is then the rival's
        checkpointed = row.get("level") == CHECKPOINTING
        colour = figures.GREY if checkpointed else figures.OURS
    elif row.get("level", "stock") not in ("stock", CHECKPOINTING):
        colour = figures.LEAN_LORA
    said = f"{mib(size)} MiB" + (f"  ({ratio})" if ratio else "")
    return saved_label(row), size / MIB, colour, said


def saved_label(row: Row) -> str:
    method = row["method"].replace(", backend native", "").replace(", backend", ",")
    method = method.replace(" on q, k, v, out in", ",")
    level = row.get("level", "stock")
    return method if level == "stock" else f"{method} · {level}"


def is_rival(row: Row) -> bool:
    method = row["method"]
    stock = row.get("level", "stock") == "stock"
    return stock and method.startswith("PEFT LoRA") and method.endswith("bf16")


@dataclass(frozen=True)
class Results:
    """By device, GPUs first."""

    steps: dict[str, Found]
    ops: dict[str, Found]
    inference: dict[str, Found]
    largest: dict[str, Found]
    saved: Found | None


def read(folder: Path) -> Results:
    """Quick runs do not count."""
    steps, ops, inference, largest = {}, {}, {}, {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or "rows" not in data or path.stem == "saved_bytes":
            continue
        if "device" not in data["environment"] or data["environment"].get("quick"):
            continue
        if path.stem.startswith(step_targets.STEP_STEM):
            steps[path.stem.removeprefix(step_targets.STEP_STEM)] = data
        elif path.stem.startswith(report_inference.STEM):
            inference[path.stem.removeprefix(report_inference.STEM)] = data
        elif path.stem.startswith(report_memory.STEM):
            largest[path.stem.removeprefix(report_memory.STEM)] = data
        elif all("op" in row for row in data["rows"]):
            ops[path.stem] = data
    saved = folder / "saved_bytes.json"
    first = lambda item: item[0] == "cpu"  # noqa: E731
    return Results(
        *(dict(sorted(found.items(), key=first)) for found in (steps, ops, inference, largest)),
        json.loads(saved.read_text()) if saved.exists() else None,
    )


def missing(results: Results) -> Iterator[str]:
    kinds = (
        ("training steps", results.steps, "bench_step.py"), ("ops", results.ops, "run.py"),
        ("calls of denoisers", results.inference, "bench_inference.py"),
    )  # fmt: skip
    for what, found, script in kinds:
        if not any("capability" in f["environment"] for f in found.values()):
            yield (
                f"- {what} on a GPU: none measured (`python benchmarks/{script}` on a machine "
                "with one)"
            )
        if "cpu" not in found:
            yield f"- {what} on a CPU: `python benchmarks/{script}`"
    if results.saved is None:
        yield "- saved bytes: `python -m benchmarks.count_saved`"


def page(folder: Path, out: Path) -> str:
    results = read(folder)
    lines = [
        "# Report",
        "",
        "Made by `make report` from `benchmarks/results/*.json`. Ratios of steps are of times from "
        "one loop, over PEFT LoRA with r = 16 on q, k, v and out, in eager on the stock trunk.",
    ]
    absent = list(missing(results))
    if absent:
        lines += ["", "Missing:", "", *absent]
    for stem, step in results.steps.items():
        lines += step_sections(step, f"step-{stem}", out)
    for stem, found in results.inference.items():
        lines += report_inference.sections(found, stem, out)
    for found in results.largest.values():
        lines += report_memory.section(found)
    for stem, found in results.ops.items():
        lines += op_section(found, stem, out)
    if results.saved is not None:
        lines += saved_section(results.saved, out)
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="results/*.json as a page with pictures")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--out", type=Path, default=HERE / "REPORT.md")
    options = parser.parse_args(arguments)
    if not options.results.is_dir():
        parser.error(f"--results: expected a folder, got {options.results}")
    out = options.out.parent / "figures"
    for old in out.glob("*.png"):  # of results that are no longer there
        old.unlink()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(page(options.results, out))
    print(f"written: {options.out}, {len(list(out.glob('*.png')))} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
