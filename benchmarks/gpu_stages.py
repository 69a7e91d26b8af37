"""The stages of gpu.py: their commands, and what their outputs say."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# what the script of a stage is given
BENCHES = {
    "bench-adapter": ["--only", "adapter", "--rank", "64"],
    "bench-adapter-16": ["--only", "adapter", "--rank", "16"],
    "bench-bank": ["--only", "adapter_bank"],
    "bench-linear": ["--only", "adapter_linear", "--rank", "64"],
    "bench-linear-16": ["--only", "adapter_linear", "--rank", "16"],
    "bench-cross": ["--only", "cross_attention_adapter"],
    "bench-block": ["--only", "block"],
    "bench-step": ["--only", r"SDXL .*batch 4 \| adapters"],
    "bench-step-small": ["--only", r"(SD1\.5 .*batch 4|batch 1) \| adapters"],
    "bench-step-full": ["--only", r"\| full \|"],
    "bench-step-compile": ["--only", r"batch 4 \| compiled \|"],
    "bench-step-graph": ["--only", r"\| captured \|"],
    "bench-largest": [],
    "bench-inference": [],
    "bench-geglu": ["--only", "geglu"],
    "bench-quantize": ["--only", "quantize"],
    "bench-group-norm": ["--only", "group_norm"],
    "bench-layer-norm": ["--only", "layer_norm"],
}
# of a stage, where it is not run.py
SCRIPTS = {
    **{stage: "benchmarks/bench_step.py" for stage in BENCHES if stage.startswith("bench-step")},
    "bench-largest": "benchmarks/bench_largest.py",
    "bench-inference": "benchmarks/bench_inference.py",
}
STAGES = ("build", "test-ops", "test-train", "test-rest", "sanitize", *BENCHES, "study", "targets")
# as benchmarks/study/LETTERS.md says
PAIR = "georgian-32"
STUDY = [
    "--k", "20", "--seeds", *map(str, range(8)), "--methods", "full", "full-slow", "attention",
    "lora-slow", "gelu", "film", "parallel", "--contender", "parallel",
    "--checkpoints", "25", "38", "57", "85", "128", "192", "288", "432",
]  # fmt: skip
GROUPS = {
    "all": STAGES, "test": ("test-ops", "test-train", "test-rest"), "bench": (*BENCHES, "targets")
}  # fmt: skip
LIMIT_S = 455  # of a stage


@dataclass
class Step:
    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    limit_s: float = LIMIT_S
    # reads the step's output (its lines) into numbers, and says what is wrong, if anything
    read: Callable[[str], tuple[dict[str, Any], str]] = lambda text: ({}, "")

    def shown(self) -> str:
        settings = [f"{k}={shlex.quote(v)}" for k, v in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def steps(stage: str, options: argparse.Namespace, arch: str, folder: Path) -> list[Step]:
    python = sys.executable
    if stage == "build":
        build = {"A3FTA_CUDA": "1", "A3FTA_CUDA_ARCHS": arch}
        loads = (
            "import a3fta_kernels; found = a3fta_kernels.backends(); "
            "print(*(f'{k}: {v}' for k, v in found.items()), sep='\\n'); "
            "raise SystemExit('cuda' not in found['native'].devices)"
        )
        return [
            Step("compile", [python, "setup.py", "build_ext", "--inplace"], build),
            Step("load", [python, "-c", loads], limit_s=120),
        ]
    if stage == "test-ops":
        return [test_step(python, ["tests/ops"], folder / "ops.xml")]
    if stage == "test-train":
        return [test_step(python, ["tests/train"], folder / "train.xml")]
    if stage == "test-rest":
        # the ahead-of-time tests need no GPU and run in `make test`
        where = ["tests", *(f"--ignore=tests/{part}" for part in ("aot", "ops", "train"))]
        return [test_step(python, where, folder / "rest.xml")]
    if stage == "sanitize":
        return sanitize_steps(python, options.quick)
    if stage == "targets":
        command = [python, "-m", "benchmarks.targets", "--results", str(options.out)]
        command += ["--quick"] * options.quick
        return [Step("targets", command, limit_s=120, read=read_targets)]
    if stage == "study":
        command = [python, "-m", "a3fta_kernels", "study", "--pair", PAIR, "--device", "cuda"]
        command += [*STUDY, "--folder", str(options.out / f"study-{PAIR}")]
        # runs that have begun end within the stage's time: few at once, and none begins late
        command += ["--processes", "8", "--minutes", f"{min(3.5, options.minutes):g}"]
        command += ["--limit", "4"] * options.quick
        return [Step("study", command)]
    script = SCRIPTS.get(stage, "benchmarks/run.py")
    command = [python, script, "--device", "cuda", *BENCHES[stage]]
    command += ["--minutes", f"{options.minutes:g}", "--out", str(options.out)]
    command += ["--quick"] * options.quick
    command += ["--commit", options.commit] if options.commit else []
    command += ["--without", options.without] if options.without else []
    return [Step(stage.removeprefix("bench-"), command)]


def read_targets(text: str) -> tuple[dict[str, Any], str]:
    """A target that is missed is a result, not a failure."""
    found = re.findall(r"^targets: (\d+) met, (\d+) missed, (\d+) not measured", text, re.M)
    if not found:
        return {}, "the targets were not reported"
    return dict(zip(("met", "missed", "not measured"), map(int, found[-1]), strict=True)), ""


def test_step(python: str, where: list[str], report: Path) -> Step:
    command = [python, "-m", "pytest", *where, "-q", "-rfE", "--tb=short", "-o", "addopts="]
    command += ["-p", "benchmarks.optional_packages", "-p", "benchmarks.gpu_tests"]
    command += ["-p", "no:cacheprovider", f"--junitxml={report}"]
    if importlib.util.find_spec("pytest_benchmark"):
        command.append("--benchmark-disable")
    if importlib.util.find_spec("pytest_timeout"):
        command.append("--timeout=180")
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(14, (os.cpu_count() or 1) - 2))
        command += ["-n", str(workers), "--dist", "worksteal"]
    return Step("suite", command, read=lambda text: read_report(report, text))


def read_report(report: Path, text: str) -> tuple[dict[str, Any], str]:
    """Counts from pytest's last line, and from its JUnit file the reasons of the skips."""
    lines = re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error).* in [\d.]+s.*)$", text, re.M)
    if not lines or not report.exists():
        return {}, "pytest did not report"
    found = re.findall(r"(\d+) (passed|failed|skipped|error)", lines[-1])
    numbers: dict[str, Any] = {what: int(count) for count, what in found}
    skips: Counter[str] = Counter()
    for skipped in ElementTree.parse(report).iter("skipped"):
        whole_file = re.search(r"Skipped: ([^'\"]+)", skipped.text or "")
        message = skipped.get("message") or "no reason given"
        skips[whole_file[1] if whole_file and "collection" in message else message] += 1
    wrong = "tests failed" if {"failed", "error"} & numbers.keys() else ""
    return numbers | {"skips": dict(skips.most_common())}, wrong


def sanitize_steps(python: str, quick: bool) -> list[Step]:
    tool = find_sanitizer() or "compute-sanitizer"
    # every allocation its own, so that the tool sees the end of each
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    found = []
    for name, backend in (
        ("memcheck", "native"),
        ("racecheck", "native"),
        ("initcheck", "native"),
        ("memcheck", "triton"),
    ):
        command = [tool, "--tool", name, "--print-limit", "20000", "--show-backtrace", "no"]
        command += ["--report-api-errors", "no"]
        command += [python, "benchmarks/sanitize_case.py", "--backend", backend]
        command += ["--quick"] * quick
        # of products in 16 bits the library writes what initcheck does not see written
        command += ["--dtypes", "float32"] if name == "initcheck" else []
        environment = {} if name == "racecheck" else alone

        def read(text: str, name: str = name) -> tuple[dict[str, Any], str]:
            return read_sanitizer(text, name)

        # all of it in one stage: memcheck is several times as fast
        share = 0.15 if name == "memcheck" else 0.35
        found.append(Step(f"{name} {backend}", command, environment, share * LIMIT_S, read))
    return found


def find_sanitizer() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path("/usr/local").glob("cuda-*")]
    places = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.pathsep.join(places)
    )


def read_sanitizer(text: str, tool: str) -> tuple[dict[str, Any], str]:
    """Errors, by whose kernel they are in.

    Library kernels may read padding and have hazards by design: with racecheck and initcheck only
    what names this package's kernels counts, or a copy to the host. memcheck counts everything.
    """
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: ((\d+) .*)", text)
    if not found:
        return {}, "compute-sanitizer did not finish"
    if "sanitize_case: done" not in text:
        return {}, "the case did not run to its end"
    summary, total = found[-1][0], int(found[-1][1])
    body = [line for line in text.splitlines() if line.startswith("=========")]
    foreign = 0
    if tool in ("racecheck", "initcheck"):
        for i, line in enumerate(body):
            where = " ".join(body[i : i + 3])
            if re.search(r"= (Uninitialized __|(Error|Warning): Race)", line):
                foreign += "a3fta" not in where
    numbers = {"errors": total - foreign, "in library kernels": foreign}
    return numbers, "" if total <= foreign else f"compute-sanitizer: {summary}"
