"""Writes which path of adapter_linear is fastest per shape, from benchmark results.

    python -m benchmarks.choose benchmarks/results/<device>.json

reads the medians of forward and backward together, backend by backend and path by path, and
replaces the entry of that class of device in a3fta_kernels/ops/adapter_linear/choices.json.
Nothing is measured here. Quick runs are refused: their medians are of few samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from a3fta_kernels.ops.adapter_linear import choice
from a3fta_kernels.ops.adapter_linear.contract import PATHS

from .workloads import CPU, GPU

OP = "adapter_linear"
# one shape, one choice: a workload with a residual has a twin without
SHAPES = {w.name(OP): w for w in (*CPU[OP], *GPU[OP]) if not w.residual}
PROVENANCE = ("device", "date", "commit", "driver", "torch", "triton")


def choices(results: dict[str, Any]) -> dict[str, Any]:
    """The entry of choices.json for one file of results."""
    about = results["environment"]
    if about.get("quick", False):
        raise ValueError("results: expected those of a full run, got a --quick one")
    medians: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    commits = set()
    for row in results["rows"]:
        backend, _, path = row["variant"].partition("-")
        if (row["op"], row["direction"]) != (OP, "forward+backward"):
            continue
        if path in PATHS and row["workload"] in SHAPES:
            medians[row["workload"], row["dtype"], backend][path] = row["q50_us"]
            commits.add(row.get("commit", about["commit"]))
    found = []
    for (workload, dtype, backend), times in medians.items():
        # a path that has no rival was not chosen
        if len(times) > 1:
            w = SHAPES[workload]
            sizes = (w.m, w.n, w.width, w.r)
            found.append([backend, dtype, *sizes, min(times, key=times.__getitem__)])
    if not found:
        raise ValueError(
            "results: expected rows of adapter_linear, forward+backward, by two paths or more of "
            "a backend; got none"
        )
    provenance = {name: about[name] for name in PROVENANCE if name in about}
    provenance["commit"] = " and ".join(sorted(commits))
    return provenance | {"choices": sorted(found)}


def render(table: dict[str, Any]) -> str:
    """JSON with one choice a line."""
    parts = []
    for device, entry in sorted(table.items()):
        lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items() if k != "choices"]
        rows = ",\n".join(f"   {json.dumps(row)}" for row in entry["choices"])
        lines.append(f'  "choices": [\n{rows}\n  ]')
        parts.append(f" {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="benchmarks/results/<device>.json")
    parser.add_argument("--table", type=Path, default=choice.TABLE)
    options = parser.parse_args(arguments)
    try:
        results = json.loads(options.results.read_text())
        if not isinstance(results, dict) or not {"environment", "rows"} <= results.keys():
            raise ValueError("results: expected those of benchmarks/run.py, got another file")
        device = results["environment"].get("capability", "cpu")
        entry = choices(results)
    except (OSError, ValueError) as error:
        print(f"choose: {options.results.name}: {error}", file=sys.stderr)
        return 1
    table = json.loads(options.table.read_text()) | {device: entry}
    options.table.write_text(render(table))
    print(f"{len(entry['choices'])} choices for {device} written to {options.table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
