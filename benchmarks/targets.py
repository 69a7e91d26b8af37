"""What a device's results met and missed, by how much, and what bounds it.

    python -m benchmarks.targets [--results DIR] [--quick]

Reads results/<device>.json and step_<device>.json (where a GPU is, its own files; else every
GPU's, and the CPU's steps), prints the verdicts and writes them to results/<device>-targets.md. A
number that was not measured is not printed. The targets are stated for an H200, bf16, R = 16 and
64; those of a whole training step stand in step_targets.py.

Ours is the variant `auto`, what a user gets; a path that is faster by more than 2 % is named. The
bound is the largest of three terms, with its share of the time: the bytes and the arithmetic of the
floor, and the kernels that were launched at what the smallest kernel costs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

from . import floors, step_targets
from .workloads import DIRECTIONS, Workload, workloads

RESULTS = Path(__file__).parent / "results"
MIB = 2**20
CAPPED = "capped near 1.2: only a fifth of the projection's input is attention"

Row = dict[str, Any]
Rows = dict[str, Row]  # of one group, by variant
# of ours and its group's rows: the number that is held to the limit, None where a row is missing
Value = Callable[[Row, Rows, Workload], float | None]


@dataclass(frozen=True)
class Target:
    name: str
    op: str
    direction: str
    value: Value
    limit: float
    at_most: bool = False
    mean: bool = False  # of all workloads, else each of them
    judged: Callable[[Workload], bool] = lambda w: True
    ours: str = ""  # a variant by its name, else what a user gets
    notes: Callable[[Workload], str] = lambda w: ""

    @property
    def wanted(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{sign} {self.limit:.2f}{' (geometric mean)' if self.mean else ''}"

    def excess(self, value: float) -> float:
        """How much longer than the target allows, as a fraction; negative where it is met."""
        return (value / self.limit if self.at_most else self.limit / value) - 1


def times_faster(rival: str) -> Value:
    def value(ours: Row, rows: Rows, w: Workload) -> float | None:
        return rows[rival]["q50_us"] / ours["q50_us"] if rival in rows else None

    return value


def times_as_long(rival: str) -> Value:
    def value(ours: Row, rows: Rows, w: Workload) -> float | None:
        return ours["q50_us"] / rows[rival]["q50_us"] if rival in rows else None

    return value


def of_the_least(ours: Row, rows: Rows, w: Workload) -> float | None:
    """Over what the frozen products, the adapter's arithmetic and one read of dy and h take."""
    if not {"frozen", "read"} <= rows.keys():
        return None
    least = floors.arithmetic_ratio(w) * rows["frozen"]["q50_us"] + rows["read"]["q50_us"]
    return ours["q50_us"] / least


def _fills_the_chip(w: Workload) -> bool:
    return w.m * w.c >= 5e6


def _cap(w: Workload) -> str:
    return CAPPED if w.k else ""


def _targets() -> Iterator[Target]:
    shares = {("native", "forward"): 0.90, ("native", "backward"): 0.75,
              ("triton", "forward"): 0.90, ("triton", "backward"): 0.60}  # fmt: skip
    for (backend, direction), limit in shares.items():

        def large(w: Workload, direction: str = direction) -> bool:
            return floors.copied("adapter", w, direction, torch.bfloat16)["clone"] >= 40 * MIB

        yield Target(
            f"adapter {direction}, {backend}: of a clone's bandwidth, at 40 MiB and more",
            "adapter", direction, times_faster("clone"), limit, judged=large, ours=backend,
        )  # fmt: skip
    for direction in DIRECTIONS[:2]:
        for rival, limit in (("eager", 2.5), ("compile", 1.3)):
            yield Target(
                f"adapter {direction}: times faster than {rival}",
                "adapter", direction, times_faster(rival), limit, mean=True,
            )  # fmt: skip
    for direction in DIRECTIONS[:2]:

        def wide(w: Workload, direction: str = direction) -> bool:
            return floors.copied("layer_norm", w, direction, torch.bfloat16)["clone"] >= 40 * MIB

        yield Target(
            f"layer_norm {direction}: of a clone's bandwidth, at 40 MiB and more",
            "layer_norm", direction, times_faster("clone"), 0.75, judged=wide,
        )  # fmt: skip
        yield Target(
            f"group_norm and silu, {direction}: times faster than eager",
            "group_norm", direction, times_faster("eager"), 1.5, mean=True,
        )  # fmt: skip
    step = DIRECTIONS[2]
    yield Target(
        "adapter_linear: time over (1 + 3R/C + R/M) x frozen products + one read of dy and h, "
        "where C >= 640 and M C >= 5e6",
        "adapter_linear", step, of_the_least, 1.10, at_most=True,
        judged=lambda w: w.c >= 640 and _fills_the_chip(w),
    )  # fmt: skip
    for rival, limit in (("eager", 1.6), ("peft", 1.3)):
        yield Target(
            f"adapter_linear: times faster than {rival}",
            "adapter_linear", step, times_faster(rival), limit, mean=True, notes=_cap,
        )  # fmt: skip
    yield Target(
        "attention to text, adapter and projection: times faster than attention and eager",
        "cross_attention_adapter", step, times_faster("eager"), 1.7, mean=True,
    )  # fmt: skip
    yield Target(
        "transformer block: time over the frozen block, where M C >= 5e6",
        "block", step, times_as_long("frozen"), 1.10, at_most=True, judged=_fills_the_chip,
    )  # fmt: skip


TARGETS = tuple(_targets())
UNLIKE_OURS = ("eager", "compile", "peft", "frozen", "clone", "read", "sdpa+auto")


@dataclass
class Verdict:
    target: Target
    values: dict[str, float]  # by workload
    missing: list[str]
    rows: dict[str, tuple[Row, Rows, Workload]]

    @property
    def mean(self) -> float | None:
        return geometric_mean(self.values.values()) if self.values else None

    @property
    def worst(self) -> str | None:
        return max(self.values, key=lambda k: self.target.excess(self.values[k]), default=None)

    @property
    def deciding(self) -> float | None:
        """The number that the limit is for."""
        if self.target.mean:
            return self.mean
        return None if self.worst is None else self.values[self.worst]

    @property
    def state(self) -> str:
        """met, missed or not measured. One workload beyond the limit is enough to miss a target
        that holds for each; a mean is judged when all of it was measured."""
        value = self.deciding
        if value is None or (self.missing and self.target.mean):
            return "not measured"
        if self.target.excess(value) > 0:
            return "missed"
        return "not measured" if self.missing else "met"

    def found(self) -> str:
        total = len(self.values) + len(self.missing)
        if self.deciding is None:
            return f"0 of {total} workloads measured"
        at = "" if self.target.mean else f" at {self.worst}, the worst"
        text = f"{self.deciding:.2f}{at}"
        uncapped = [v for k, v in self.values.items() if not self.target.notes(self.rows[k][2])]
        if self.target.mean and 0 < len(uncapped) < len(self.values):
            text += f" ({geometric_mean(uncapped):.2f} without Flux's single blocks, {CAPPED})"
        return text + (f"; {len(self.values)} of {total} workloads" if self.missing else "")

    def said(self) -> str:
        value = self.deciding
        if self.state != "missed" or value is None:
            return self.state
        return f"missed: {self.target.excess(value):.0%} too slow"


def judge(found: dict[str, Any]) -> list[Verdict]:
    """One verdict per target. Only a GPU's rows in bf16 count."""
    grouped: dict[tuple[str, str, str], Rows] = {}
    if "capability" in found.get("environment", {}):
        for row in found["rows"]:
            if row["dtype"] == "bfloat16":
                key = (row["op"], row["workload"], row["direction"])
                grouped.setdefault(key, {})[row["variant"]] = row
    verdicts = []
    for target in TARGETS:
        verdict = Verdict(target, {}, [], {})
        for w, _ in workloads(target.op, "cuda", quick=False):
            if not target.judged(w):
                continue
            name = w.name(target.op)
            rows = grouped.get((target.op, name, target.direction), {})
            ours = rows.get(target.ours) if target.ours else ours_of(rows)
            value = None if ours is None else target.value(ours, rows, w)
            if ours is None or value is None:
                verdict.missing.append(name)
            else:
                verdict.values[name], verdict.rows[name] = value, (ours, rows, w)
        verdicts.append(verdict)
    return verdicts


def ours_of(rows: Rows) -> Row | None:
    """What a user gets: `auto`, which is not a variant of its own where there is no choice."""
    if "auto" in rows:
        return rows["auto"]
    ours = [r for name, r in rows.items() if name not in UNLIKE_OURS]
    return ours[0] if len(ours) == 1 else None


def bound(row: Row) -> str:
    """The largest term and its share of the time."""
    terms = row.get("terms_us")
    if not terms:
        return "no terms recorded"
    name = max(terms, key=lambda k: terms[k])
    text = f"{name}, {terms[name] / row['q50_us']:.0%} of the time"
    # then no term explains the time
    return text if 2 * terms[name] > row["q50_us"] else f"occupancy or latency (of terms: {text})"


def faster(ours: Row, rows: Rows) -> str:
    """The path that a better choice would have taken."""
    own = {k: r["q50_us"] for k, r in rows.items() if k not in UNLIKE_OURS}
    best = min(own, key=lambda k: own[k])
    if own[best] > 0.98 * ours["q50_us"]:
        return ""
    return f"{best} takes {own[best] / ours['q50_us']:.2f} of it"


def report(
    found: dict[str, Any], verdicts: list[Verdict], step: dict[str, Any] | None = None
) -> list[str]:
    """Markdown: the verdicts, those of a whole step, then the workloads of each target, then
    launches and host time."""
    about = found["environment"]
    steps = step_targets.judge(step, "cuda")
    lines = [f"# Targets on {about['device']}", ""]
    if "capability" in about:
        keys = ("driver", "cuda", "torch", "triton", "commit", "date")
        lines += [", ".join(f"{k} {about.get(k, 'unknown')}" for k in keys) + ".", ""]
    lines += ["| target | wanted | found | verdict |", "|---|---|---|---|"]
    for v in verdicts:
        lines.append(f"| {v.target.name} | {v.target.wanted} | {v.found()} | {v.said()} |")
    lines += step_targets.table(step, "cuda", steps)
    for v in verdicts:
        if v.values:
            lines += ["", f"## {v.target.name}", "", *_workload_table(v)]
    lines += _launches(found)
    return [*lines, "", _counts([v.state for v in (*verdicts, *steps)])]


def report_cpu(step: dict[str, Any]) -> list[str]:
    """The verdicts of whole steps on a CPU, which no other target is for."""
    steps = step_targets.judge(step, "cpu")
    lines = [f"# Targets on {step['environment']['device']} (CPU)"]
    lines += step_targets.table(step, "cpu", steps)
    return [*lines, "", _counts([v.state for v in steps])]


def _counts(states: list[str]) -> str:
    counts = [f"{states.count(s)} {s}" for s in ("met", "missed", "not measured")]
    return f"targets: {', '.join(counts)}"


def _workload_table(verdict: Verdict) -> list[str]:
    target = verdict.target
    lines = [
        f"| workload | variant | µs | wanted {target.wanted} | bound by | besides |",
        "|---|---|---|---|---|---|",
    ]
    for name, value in verdict.values.items():
        ours, rows, w = verdict.rows[name]
        excess = target.excess(value)
        over = f", {excess:.0%} too slow" if excess > 0 else ""
        besides = "; ".join(filter(None, [target.notes(w), faster(ours, rows)]))
        lines.append(
            f"| {name} | {ours['variant']} | {ours['q50_us']:.1f} | {value:.2f}{over} | "
            f"{bound(ours)} | {besides} |"
        )
    lines += [f"| {name} | | not measured | | | |" for name in verdict.missing]
    return lines


def _launches(found: dict[str, Any]) -> list[str]:
    """Kernels and the CPU's time per training step, ours beside eager and frozen."""
    rows = [
        r
        for r in found.get("rows", [])
        if r["direction"] == DIRECTIONS[2] and "enqueue_us" in r and r["variant"] in _SHOWN
    ]
    if not rows:
        return []
    lines = [
        "", "## Launches, forward and backward", "",
        "| bench | workload | variant | µs | kernels | CPU, µs |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        kernels = r.get("counts", {}).get("kernels", "not measured")
        lines.append(
            f"| {r['op']} | {r['workload']} | {r['variant']} | {r['q50_us']:.1f} | {kernels} | "
            f"{r['enqueue_us']:.0f} |"
        )
    return lines


_SHOWN = ("auto", "eager", "peft", "frozen")


def stems(folder: Path, quick: bool) -> list[str]:
    """The GPUs that there are results of: the one at hand, else all."""
    if torch.cuda.is_available():
        from .measure import file_stem

        return [file_stem(torch.device("cuda"))]
    found = set()
    for path in folder.glob("*.json"):
        data = json.loads(path.read_text())
        environment = data.get("environment", {}) if isinstance(data, dict) else {}
        stem = path.stem.removeprefix(step_targets.STEP_STEM)
        if "capability" not in environment or environment.get("quick") != quick:
            continue
        # no other results have targets
        if stem != path.stem or all("op" in row for row in data.get("rows", [{}])):
            found.add(stem.removesuffix("-quick") if quick else stem)
    return sorted(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what the results met and missed, and why")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="of a quick run")
    options = parser.parse_args(arguments)
    folder, quick = options.results, options.quick
    if not folder.is_dir():
        parser.error(f"--results: expected a folder, got {folder}")
    suffix = "-quick" if quick else ""
    texts: dict[str, list[str]] = {}
    on_cpu = step_targets.read(folder, "cpu", quick)
    if on_cpu is not None and not torch.cuda.is_available():
        texts["cpu"] = report_cpu(on_cpu)
    nothing: dict[str, Any] = {"environment": {"device": "a GPU: no results yet"}, "rows": []}
    for stem in stems(folder, quick):
        path, step = folder / f"{stem}{suffix}.json", step_targets.read(folder, stem, quick)
        if path.exists():
            found = json.loads(path.read_text())
        elif step is not None:
            found = {"environment": step["environment"], "rows": []}
        else:
            continue
        texts[stem] = report(found, judge(found), step)
    for stem, lines in texts.items():
        (folder / f"{stem}{suffix}-targets.md").write_text("\n".join(lines) + "\n")
    if not texts.keys() - {"cpu"}:
        texts[""] = report(nothing, judge(nothing))
    print("\n".join("\n".join(lines) for lines in texts.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
