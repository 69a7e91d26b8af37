"""Everything that needs a GPU, in stages that each end within 8 minutes.

    python benchmarks/gpu.py                    all stages, one after the other
    python benchmarks/gpu.py --stage build test-ops      some of them

    build            the library, for the GPU found here only
    test-ops         the tests of the ops, on cuda too
    test-train       the recipe: on the CPU, and runs on cuda
    test-rest        all other tests, on cuda too
    sanitize         compute-sanitizer over every CUDA kernel
    bench-adapter    `ops.adapter` with R = 64: results/<device>.json; its other rows stay
    bench-adapter-16                with R = 16
    bench-linear     `ops.adapter_linear` with R = 64
    bench-linear-16                       with R = 16
    bench-cross      attention to text
    bench-block      a whole transformer block
    bench-step       whole training steps of SDXL and SD1.5: results/step_<device>.json
    bench-step-compile          beside rivals under torch.compile
    bench-step-graph            as CUDA graphs, ours and LoRA
    bench-inference  a call of an adapted denoiser: results/inference_<device>.json
    study            runs of the study on letters of 32 x 32: study-<pair>/; goes on where it was
    targets          what the results met and missed, by how much, and what bounds it

`test` and `bench` stand for all of their kind; `bench` ends with the targets.

It needs PyTorch with CUDA, nvcc, a C++ compiler, pytest, hypothesis and pytest-benchmark, and no
network. What else is missing is named at the start; its tests are skipped. Packages that were
carried along, as wheels or installed, are taken from `--site DIR`; diffusers is one of them where
it is not installed (with importlib_metadata). Stages are independent, but for the build before all
others where the library is not there yet.

    --out DIR       where logs and JSON go (default benchmarks/results)
    --quick         a first look at a new machine: few cases, few workloads, few rounds
    --minutes N     start no group of a benchmark, and no run of the study, after this (default 6)
    --without TEXT  leave variants out of the benchmarks, by a pattern ("native-fused|compile")
    --commit SHA    what the results name as commit, where there is no git repository
    --dry-run       print the commands of the stages; needs no GPU

Each stage writes gpu-<stage>.log and gpu-<stage>.json and prints a table last. The exit status is
not zero when a step failed, found an error or outran its time.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# what the script of a stage is given
BENCHES = {
    "bench-adapter": ["--only", "adapter", "--rank", "64"],
    "bench-adapter-16": ["--only", "adapter", "--rank", "16"],
    "bench-bank": ["--only", "adapter_bank"],
    "bench-linear": ["--only", "adapter_linear", "--rank", "64"],
    "bench-linear-16": ["--only", "adapter_linear", "--rank", "16"],
    "bench-cross": ["--only", "cross_attention_adapter"],
    "bench-block": ["--only", "block"],
    "bench-step": ["--only", r"\| (adapters|full) \|"],
    "bench-step-compile": ["--only", r"batch 4 \| compiled \|"],
    "bench-step-graph": ["--only", r"\| captured \|"],
    "bench-inference": [],
    "bench-geglu": ["--only", "geglu"],
    "bench-quantize": ["--only", "quantize"],
    "bench-group-norm": ["--only", "group_norm"],
    "bench-layer-norm": ["--only", "layer_norm"],
}
# of a stage, where it is not run.py
SCRIPTS = {
    **dict.fromkeys(
        ("bench-step", "bench-step-compile", "bench-step-graph"), "benchmarks/bench_step.py"
    ),
    "bench-inference": "benchmarks/bench_inference.py",
}
STAGES = ("build", "test-ops", "test-train", "test-rest", "sanitize", *BENCHES, "study", "targets")
# as benchmarks/study/LETTERS.md says
PAIR = "georgian-32"
STUDY = [
    "--k", "20", "--seeds", *map(str, range(8)), "--methods", "full", "full-slow", "attention",
    "lora-slow", "gelu", "film", "parallel", "--contender", "parallel",
]  # fmt: skip
GROUPS = {
    "all": STAGES, "test": ("test-ops", "test-train", "test-rest"), "bench": (*BENCHES, "targets")
}  # fmt: skip
LIMIT_S = 455  # of a stage
GRACE_S = 15  # for a step that is interrupted, to say how far it came
NEEDED = ("pytest", "hypothesis", "pytest_benchmark")
HELPFUL = ("xdist", "pytest_timeout")


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


@dataclass
class Result:
    name: str
    command: str
    status: int | None  # None: outran its time
    seconds: float
    numbers: dict[str, Any]
    wrong: str

    @property
    def ok(self) -> bool:
        return not self.wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what needs a GPU, in stages")
    parser.add_argument("--stage", nargs="+", default=["all"], choices=(*STAGES, *GROUPS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--site", type=Path, help="carried packages: wheels, or installed")
    parser.add_argument("--commit", default="")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--without", default="")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(arguments)
    wanted = tuple(s for name in options.stage for s in GROUPS.get(name, (name,)))

    if options.dry_run:
        for stage in wanted:
            for step in steps(stage, options, "90a", Path("TEMPORARY")):
                print(f"[{stage}] {step.shown()}")
        return 0
    reason = no_gpu()
    if reason:
        print(f"gpu: no stage can run here: {reason}", file=sys.stderr)
        return 2
    return run_stages(wanted, options)


def run_stages(wanted: tuple[str, ...], options: argparse.Namespace) -> int:
    import torch

    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    codes = []
    with tempfile.TemporaryDirectory() as folder:
        site = prepare_site(options.site, Path(folder))
        environment = {"PYTHONUNBUFFERED": "1"}
        if site:
            sys.path.insert(0, str(site))
            environment["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(site), os.environ.get("PYTHONPATH")])
            )
        sys.path.insert(0, str(ROOT))
        from benchmarks.optional_packages import OPTIONAL

        absent = [p for p in (*NEEDED, *HELPFUL, *OPTIONAL) if importlib.util.find_spec(p) is None]
        if absent:
            print(f"not installed, so not tested: {', '.join(absent)}")
        for stage in wanted:
            arch = arch_of(torch.cuda.get_device_capability())
            found = steps(stage, options, arch, Path(folder))
            codes.append(run_stage(stage, found, environment, options, absent))
    return int(any(codes))


def no_gpu() -> str:
    """Why no GPU can be used; empty where one can."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU (see nvidia-smi)"
    return ""


def arch_of(capability: tuple[int, int]) -> str:
    """A3FTA_CUDA_ARCHS for a device: 90a and 100a have instructions that 90 and 100 lack."""
    name = f"{capability[0]}{capability[1]}"
    return f"{name}a" if name in ("90", "100") else name


def prepare_site(site: Path | None, folder: Path) -> Path | None:
    """The folder to put on the path: `site` itself, or what its wheels unpack to."""
    if site is None:
        return None
    site = site.resolve()
    wheels = sorted(map(str, site.glob("*.whl")))
    if not site.is_dir():
        raise SystemExit(f"gpu: --site: expected a folder, got {site}")
    if not wheels:
        return site
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--target", str(target), *wheels]
    subprocess.run(command, check=True)
    return target


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
        command += ["--minutes", f"{options.minutes:g}"] + ["--limit", "4"] * options.quick
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
        workers = max(1, min(8, (os.cpu_count() or 1) // 2))
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
        environment = {} if name == "racecheck" else alone

        def read(text: str, name: str = name) -> tuple[dict[str, Any], str]:
            return read_sanitizer(text, name)

        found.append(Step(f"{name} {backend}", command, environment, LIMIT_S / 4, read))
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


def run_stage(
    stage: str,
    found: list[Step],
    environment: dict[str, str],
    options: argparse.Namespace,
    absent: list[str],
) -> int:
    end = time.monotonic() + LIMIT_S
    results = []
    log = options.out / f"gpu-{stage}.log"
    with log.open("w") as sink:
        for step in found:
            step.environment = environment | step.environment
            limit = min(step.limit_s, end - time.monotonic())
            result = run_step(step, limit, sink)
            results.append(result)
            if not result.ok and stage == "build":
                break
    record = {
        "stage": stage,
        "environment": about(options.commit),
        "not_installed": absent,
        "steps": [dataclasses.asdict(r) for r in results],
    }
    (options.out / f"gpu-{stage}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n[{stage}] log: {log}")
    for result in results:
        numbers = {k: v for k, v in result.numbers.items() if k != "skips"}
        text = ", ".join(f"{k} {v}" for k, v in numbers.items())
        verdict = "ok" if result.ok else f"FAILED: {result.wrong}"
        print(f"  {result.name:18s} {result.seconds:5.0f} s  {verdict}  {text}")
        for reason, count in result.numbers.get("skips", {}).items():
            print(f"    skipped {count}: {reason}")
    return int(not all(r.ok for r in results))


def run_step(step: Step, limit_s: float, sink: Any) -> Result:
    """Runs one command for at most `limit_s`, then ends it with its children; keeps its output."""
    print(f"\n$ {step.shown()}", flush=True)
    sink.write(f"$ {step.shown()}\n")
    began = time.monotonic()
    lines = []
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | step.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            errors="replace", preexec_fn=interruptible,
        )  # fmt: skip
    except OSError as error:
        sink.write(f"{error}\n")
        return Result(step.name, step.shown(), None, 0.0, {}, str(error))
    late = []

    def stop(*_: Any) -> None:
        late.append(True)
        if len(late) == 1:  # pytest then still reports what ran
            os.kill(process.pid, signal.SIGINT)
            signal.setitimer(signal.ITIMER_REAL, GRACE_S)
        else:
            os.killpg(process.pid, signal.SIGKILL)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, limit_s))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            sink.write(line)
            print(line, end="", flush=True)
        status = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    seconds = time.monotonic() - began
    numbers, wrong = step.read("".join(lines))
    if late:
        status, wrong = None, f"stopped after {limit_s:.0f} s"
    if not wrong and status != 0:
        wrong = f"exit status {status}"
    return Result(step.name, step.shown(), status, seconds, numbers, wrong)


def interruptible() -> None:
    """A shell starts background jobs with the interrupt ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def about(commit: str) -> dict[str, Any]:
    import torch

    from benchmarks import measure

    found = measure.environment(torch.device("cuda"))
    return found | ({"commit": commit} if commit else {})


if __name__ == "__main__":
    sys.exit(main())
