"""All tests, in the processes that they need, and a closing account of what did not run here.

python scripts/run_tests.py [--workers 2]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import a3fta_kernels

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "build" / "tests"
INTERPRETED = ("tests/ops", "tests/processors/test_cross_attention.py", "-k", "triton or launches")


@dataclass(frozen=True)
class Stage:
    name: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


@dataclass(frozen=True)
class Outcome:
    stage: Stage
    code: int
    seconds: float
    counts: Counter[str]
    skips: Counter[str]


def stages(workers: int) -> list[Stage]:
    parallel = ("-n", str(workers), "--dist", "worksteal") if workers > 1 else ()
    # what shares something that it compiles is marked with xdist_group
    by_group = ("-n", str(workers), "--dist", "loadgroup") if workers > 1 else ()
    return [
        Stage("suite", ("tests", "--ignore=tests/aot", "--benchmark-disable", *parallel), {}),
        # the interpreter has to be chosen before a kernel is decorated: a process of its own
        Stage("interpreter", (*INTERPRETED, *parallel), {"TRITON_INTERPRET": "1"}),
        # and what it decorates cannot be compiled
        Stage("ahead-of-time", ("tests/aot", *by_group), {}),
    ]


def run(stage: Stage) -> Outcome:
    report = REPORTS / f"{stage.name}.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        f"--junitxml={report}",
        *stage.arguments,
    ]
    shown = " ".join([*(f"{k}={v}" for k, v in stage.environment.items()), *command[1:]])
    print(f"\n[{stage.name}] {shown}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **stage.environment}).returncode
    counts, skips = read(report)
    return Outcome(stage, code, time.monotonic() - began, counts, skips)


def read(report: Path) -> tuple[Counter[str], Counter[str]]:
    """How many tests passed, failed and were skipped, and the reasons of the skips."""
    counts: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    if not report.exists():
        return counts, skips
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None:
            counts["skipped"] += 1
            skips[skipped.get("message") or "no reason given"] += 1
        elif case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
        else:
            counts["passed"] += 1
    return counts, skips


def account(outcomes: list[Outcome]) -> str:
    lines = ["", "What ran"]
    for outcome in outcomes:
        passed = "ok" if outcome.counts["passed"] else "NOTHING RAN"
        verdict = passed if outcome.code == 0 else f"FAILED (exit status {outcome.code})"
        numbers = ", ".join(f"{n} {what}" for what, n in sorted(outcome.counts.items()))
        lines.append(f"  {outcome.stage.name:<14} {verdict}: {numbers}; {outcome.seconds:.0f} s")
        lines += [f"    skipped {n}: {why}" for why, n in outcome.skips.most_common()]
    lines.append("What this machine offers")
    lines += [f"  {name:<14} {status}" for name, status in a3fta_kernels.backends().items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2, help="processes of a stage")
    arguments = parser.parse_args()
    REPORTS.mkdir(parents=True, exist_ok=True)
    outcomes = [run(stage) for stage in stages(arguments.workers)]
    print(account(outcomes))
    return int(any(outcome.code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
