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
    bench-step       whole training steps of SDXL, batch 4: results/step_<device>.json
    bench-step-small            of SD1.5, and of SDXL at batch 1
    bench-step-full             beside full fine-tuning
    bench-step-compile          beside rivals under torch.compile
    bench-step-graph            as CUDA graphs, ours and LoRA
    bench-largest    the batch that fits into a memory, beside `a3fta plan`: largest_<device>.json
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
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_stages import GROUPS, LIMIT_S, STAGES, Step, steps  # noqa: E402

GRACE_S = 15  # for a step that is interrupted, to say how far it came
NEEDED = ("pytest", "hypothesis", "pytest_benchmark")
HELPFUL = ("xdist", "pytest_timeout")


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
