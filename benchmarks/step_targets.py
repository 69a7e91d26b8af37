"""The targets of a whole training step, judged by what `bench_step.py` wrote.

Times are compared within one loop only, by a row's `beside`. A target whose rows are missing is
not measured. Those on a GPU are stated for an H200 in bf16; those on the CPU compare a trunk with
itself, and say nothing about a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .step_methods import (
    ANCHOR,
    CHECKPOINTING,
    COMPILE,
    EQUAL,
    FUSED,
    GRAPH,
    LEVELS,
    LORA,
    STOCK,
    Cell,
)

GIB = 2**30
SDXL, SDXL_ONE = ("SDXL 1024x1024", 4), ("SDXL 1024x1024", 1)
SD15 = ("SD1.5 512x512", 4)
SMALL = (("SD1.5-like", 1), ("SDXL-like", 1))
STEP_STEM = "step_"

Row = dict[str, Any]
Rows = dict[Cell, Row]  # of one model
At = tuple[str, int]  # a model's name, and the batch
Value = Callable[[Rows], float | None]


@dataclass(frozen=True)
class StepTarget:
    name: str
    device: str
    value: Value
    limit: float
    models: tuple[At, ...]

    @property
    def wanted(self) -> str:
        return f"<= {self.limit:.2f}"


def time_over(ours: Cell, *rivals: Cell) -> Value:
    """Of the fastest rival, of those that were measured in a loop with ours."""

    def value(rows: Rows) -> float | None:
        found = [r for rival in rivals if (r := times_as_long(rows, ours, rival)) is not None]
        return max(found) if len(found) == len(rivals) else None

    return value


def times_as_long(rows: Rows, ours: Cell, rival: Cell) -> float | None:
    """Both times are of one loop: that of the row in whose rounds the other one took part."""
    for cell in (ours, rival):
        beside = rows.get(cell, {}).get("beside", {})
        if {str(ours), str(rival)} <= beside.keys():
            return beside[str(ours)] / beside[str(rival)]
    return None


def peak_over(ours: Cell, rival: Cell) -> Value:
    def value(rows: Rows) -> float | None:
        a, b = (rows.get(cell, {}).get("peak_bytes") for cell in (ours, rival))
        return a / b if a is not None and b else None

    return value


def dominated(rows: Rows) -> float | None:
    """How many of our levels take at least as long and as much memory as checkpointing does."""
    rival = Cell(FUSED, CHECKPOINTING)
    found = []
    for level in LEVELS:
        ours = Cell(FUSED, level)
        time, peak = time_over(ours, rival)(rows), peak_over(ours, rival)(rows)
        if time is None or peak is None:
            return None
        found.append(time >= 1 and peak >= 1)
    return float(sum(found))


def off_prediction(rows: Rows) -> float | None:
    """How far the peak is from what was predicted, as a share, where it is farthest."""
    ratios = [
        row["peak_bytes"] / row["predicted_bytes"]
        for row in rows.values()
        if row.get("peak_bytes") and row.get("predicted_bytes")
    ]
    return max(max(ratio, 1 / ratio) for ratio in ratios) - 1 if ratios else None


def total_gib(rows: Rows) -> float | None:
    """The trunk's weights and the peak above them, of our smallest level."""
    cells = [rows.get(Cell(FUSED, level), {}) for level in LEVELS]
    totals = [r["peak_bytes"] + r["weights_bytes"] for r in cells if r.get("peak_bytes")]
    return min(totals) / GIB if totals else None


def _targets() -> Iterator[StepTarget]:
    exact, recompute, block = (Cell(FUSED, x) for x in ("exact", "recompute", "block"))
    stock, checkpointing = Cell(FUSED, STOCK), Cell(FUSED, CHECKPOINTING)
    rivals = (ANCHOR, Cell(EQUAL, STOCK))
    graphs = (Cell(FUSED, f"exact, {GRAPH}"), Cell(LORA, GRAPH))
    compiled = (Cell(LORA, COMPILE), Cell(EQUAL, COMPILE))
    gpu = [
        ("exact: time over PEFT LoRA, eager", time_over(exact, *rivals), 0.80, (SDXL,)),
        ("exact: time over PEFT LoRA, compiled", time_over(exact, *compiled), 1.0, (SDXL,)),
        ("exact, graph: time over PEFT LoRA, graph", time_over(*graphs), 0.80, (SDXL, SD15)),
        ("exact: peak above weights over PEFT LoRA", peak_over(exact, ANCHOR), 0.73, (SDXL,)),
        ("recompute: peak over PEFT LoRA", peak_over(recompute, ANCHOR), 0.30, (SDXL,)),
        ("recompute: time over PEFT LoRA, eager", time_over(recompute, *rivals), 1.0, (SDXL,)),
        ("exact: time over the stock trunk", time_over(exact, stock), 0.90, (SDXL,)),
        ("recompute: time over the stock trunk", time_over(recompute, stock), 1.15, (SDXL, SD15)),
        ("weights and peak in GiB, smallest level", total_gib, 8.0, (SDXL_ONE,)),
        ("peak: share off the prediction", off_prediction, 0.05, (SDXL, SD15)),
    ]
    cpu = [
        ("exact: time over the stock trunk", time_over(exact, stock), 1.0, SMALL),
        ("recompute: time over the stock trunk", time_over(recompute, stock), 1.15, SMALL),
    ]
    # of the small models as of the real ones: ours against computing every segment twice
    for found, models, like_sd15 in ((gpu, (SDXL, SD15), (SD15,)), (cpu, SMALL, SMALL[:1])):
        found += [
            ("levels that checkpointing dominates", dominated, 0.0, models),
            ("block: peak over checkpointing", peak_over(block, checkpointing), 1.0, like_sd15),
            ("block: time over checkpointing", time_over(block, checkpointing), 1.0, like_sd15),
        ]
    for device, found in (("cuda", gpu), ("cpu", cpu)):
        for name, value, limit, models in found:
            yield StepTarget(f"step, {name}", device, value, limit, models)


TARGETS = tuple(_targets())


@dataclass
class StepVerdict:
    target: StepTarget
    values: dict[str, float]  # by model
    missing: list[str]

    @property
    def state(self) -> str:
        """One model beyond the limit misses the target, whatever else is missing."""
        if any(v > self.target.limit for v in self.values.values()):
            return "missed"
        return "not measured" if self.missing else "met"

    def found(self) -> str:
        parts = [f"{value:.2f} ({name})" for name, value in self.values.items()]
        return ", ".join(parts + [f"not measured ({name})" for name in self.missing])

    def said(self) -> str:
        if self.state != "missed" or not self.target.limit:
            return self.state
        return f"missed: {max(self.values.values()) / self.target.limit - 1:.0%} too much"


def device_of(found: dict[str, Any]) -> str:
    return "cuda" if "capability" in found["environment"] else "cpu"


def judge(found: dict[str, Any] | None, device: str) -> list[StepVerdict]:
    """One verdict for each target of the device; none measured where nothing was found."""
    rows: dict[At, Rows] = {}
    for row in found["rows"] if found is not None and device_of(found) == device else ():
        at = (row["model"], row["batch_size"])
        rows.setdefault(at, {})[Cell(row["method"], row["variant"])] = row
    verdicts = []
    for target in TARGETS:
        if target.device != device:
            continue
        verdict = StepVerdict(target, {}, [])
        for at in target.models:
            name, value = f"{at[0]}, batch {at[1]}", target.value(rows.get(at, {}))
            if value is None:
                verdict.missing.append(name)
            else:
                verdict.values[name] = value
        verdicts.append(verdict)
    return verdicts


def table(found: dict[str, Any] | None, device: str, verdicts: list[StepVerdict]) -> list[str]:
    """Markdown."""
    lines = ["", "## A whole training step", ""]
    if found is not None:
        about = found["environment"]
        keys = ("torch", "diffusers", "peft", "commit", "date")
        said = ", ".join(f"{k} {about.get(k, 'unknown')}" for k in keys)
        lines += [f"{about['device']}{' (CPU)' * (device == 'cpu')}, {said}.", ""]
    lines += ["| target | wanted | found | verdict |", "|---|---|---|---|"]
    for v in verdicts:
        lines.append(f"| {v.target.name} | {v.target.wanted} | {v.found()} | {v.said()} |")
    return lines


def read(folder: Path, stem: str, quick: bool = False) -> dict[str, Any] | None:
    path = folder / f"{STEP_STEM}{stem}{'-quick' * quick}.json"
    return json.loads(path.read_text()) if path.exists() else None
