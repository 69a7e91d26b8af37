"""benchmarks/gpu.py, as far as it runs without a GPU: commands, limits, logs, and what it reads."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from a3fta_kernels import cli
from a3fta_kernels.backends import why_not
from benchmarks import gpu, gpu_stages, gpu_tests, sanitize_case, variants

ROOT = Path(gpu.__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def options(tmp_path: Path):
    plain = {"commit": "abc", "quick": False, "without": "", "minutes": 6.0}
    return type("Options", (), plain | {"out": tmp_path})()


def dry_run(stage: str) -> list[str]:
    done = run("benchmarks/gpu.py", "--stage", stage, "--dry-run", "--commit", "abc")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so():
    done = run("benchmarks/gpu.py", "--stage", "build")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: no stage can run here: torch")


def test_dry_run_lists_every_stage_in_order():
    lines = dry_run("all")
    stages = [line[1 : line.index("]")] for line in lines]
    assert list(dict.fromkeys(stages)) == list(gpu_stages.STAGES)
    assert "A3FTA_CUDA_ARCHS=90a" in lines[0] and "build_ext --inplace" in lines[0]
    assert all("--commit abc" in line for line in lines if line.startswith("[bench"))


def test_every_file_in_the_commands_exists(tmp_path):
    for stage in gpu_stages.STAGES:
        for step in gpu_stages.steps(stage, options(tmp_path), "90a", tmp_path):
            files = [part for part in step.command if part.endswith(".py")]
            assert all((ROOT / part).is_file() for part in files), step.command


def test_a_quick_look_is_quick_in_every_stage_that_can_be(tmp_path):
    quick = options(tmp_path)
    quick.quick, quick.without = True, "native|fused"
    for stage in ("sanitize", *gpu_stages.BENCHES, "targets"):
        for step in gpu_stages.steps(stage, quick, "90a", tmp_path):
            assert "--quick" in step.command
            if stage in gpu_stages.BENCHES:
                assert step.command[step.command.index("--without") + 1] == "native|fused"


def test_whole_steps_are_all_in_a_stage(tmp_path):
    stages = [s for s, script in gpu_stages.SCRIPTS.items() if script.endswith("bench_step.py")]
    commands = [gpu_stages.steps(s, options(tmp_path), "90a", tmp_path)[0].command for s in stages]
    wanted = [c[c.index("--only") + 1] for c in commands]
    assert len(wanted) == 5 and len(set(wanted)) == 5
    done = run("benchmarks/bench_step.py", "--device", "cuda", "--list")
    left = [n for n in done.stdout.splitlines() if not any(re.search(w, n) for w in wanted)]
    # at batch 1 nothing is said about the compiler
    assert left and all("batch 1 | compiled |" in name for name in left)


def test_the_benchmarks_end_with_the_targets():
    assert gpu_stages.STAGES[-1] == gpu_stages.GROUPS["bench"][-1] == "targets"
    assert dry_run("bench")[-1].startswith("[targets]")


def test_the_study_knows_its_options(tmp_path, monkeypatch, capsys):
    for package in ("diffusers", "peft", "scipy", "sklearn", "transformers"):
        pytest.importorskip(package)
    (step,) = gpu_stages.steps("study", options(tmp_path), "90a", tmp_path)
    assert step.command[1:4] == ["-m", "a3fta_kernels", "study"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # its plan stands; the device is looked for after it
    assert cli.main(step.command[3:]) == 1
    assert "--device: expected cpu where PyTorch finds no GPU" in capsys.readouterr().err


def test_some_stages():
    done = run(
        "benchmarks/gpu.py", "--dry-run", "--minutes", "2.5", "--stage", "build", "bench-block"
    )
    stages = [line[: line.index("]") + 1] for line in done.stdout.splitlines()]
    assert stages == ["[build]", "[build]", "[bench-block]"] and "--minutes 2.5 " in done.stdout


@pytest.mark.parametrize("stage", gpu_stages.BENCHES)
def test_the_benchmarks_know_their_options(tmp_path, stage, monkeypatch, capsys):
    (step,) = gpu_stages.steps(stage, options(tmp_path), "90a", tmp_path)
    if torch.cuda.is_available():
        pytest.skip("runs them on the GPU")
    # in this process: an interpreter of its own takes seconds to import torch
    script, *arguments = step.command[1:]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 2 and "no GPU is usable" in capsys.readouterr().err


def test_the_suite_command_runs(tmp_path):
    step = gpu_stages.test_step(
        sys.executable, ["tests/test_gpu_stages.py"], tmp_path / "tests.xml"
    )
    done = run(*step.command[1:], "-k", "test_arch")
    assert done.returncode == 0, done.stdout + done.stderr
    numbers, wrong = step.read(done.stdout)
    assert not wrong and numbers["passed"] == 4 and numbers["skips"] == {}


ABSENT = """
import pytest
{}
def test_one():
    import xformers

def test_two():
    import a_package_that_nobody_named

def test_three():
    pass
"""


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is here")
def test_what_needs_an_absent_package_is_skipped(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_inside.py").write_text(ABSENT.format(""))
    (tmp_path / "test_above.py").write_text(ABSENT.format("import xformers.ops"))
    step = gpu_stages.test_step(sys.executable, [str(tmp_path)], tmp_path / "tests.xml")
    done = run(*step.command[1:])
    numbers, wrong = step.read(done.stdout)
    assert done.returncode == 1 and wrong == "tests failed"
    assert numbers.pop("skips") == {"xformers is not installed": 2}
    assert numbers == {"passed": 1, "failed": 1, "skipped": 2}


def test_a_failed_suite_is_wrong(tmp_path):
    report = tmp_path / "tests.xml"
    last = "1 failed, 5 passed, 1 skipped, 2 warnings in 3.21s\n"
    assert gpu_stages.read_report(report, last) == ({}, "pytest did not report")
    report.write_text("<testsuite><testcase><skipped message='no GPU'/></testcase></testsuite>")
    numbers, wrong = gpu_stages.read_report(report, last)
    assert numbers == {"passed": 5, "failed": 1, "skipped": 1, "skips": {"no GPU": 1}}
    assert wrong == "tests failed"
    assert gpu_stages.read_report(report, "Killed\n") == ({}, "pytest did not report")
    long = "==== 3 passed in 361.20s (0:06:01) ====\n"
    assert gpu_stages.read_report(report, long) == ({"passed": 3, "skips": {"no GPU": 1}}, "")


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "120")]
)
def test_arch(capability, arch):
    assert gpu.arch_of(capability) == arch


def step(code: str, **rest) -> gpu_stages.Step:
    return gpu_stages.Step("one", [sys.executable, "-c", code], **rest)


def test_a_step_that_fails_fails_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "about", lambda commit: {"commit": commit})
    good = step("import os; print('said', os.environ['A3FTA_TEST'])")
    bad = step("raise SystemExit(3)")
    environment = {"A3FTA_TEST": "this"}
    assert gpu.run_stage("test", [good], environment, options(tmp_path), []) == 0
    assert "said this" in (tmp_path / "gpu-test.log").read_text()
    assert gpu.run_stage("test", [good, bad], environment, options(tmp_path), ["peft"]) == 1
    record = json.loads((tmp_path / "gpu-test.json").read_text())
    assert [s["wrong"] for s in record["steps"]] == ["", "exit status 3"]
    assert record["not_installed"] == ["peft"] and record["environment"] == {"commit": "abc"}


def test_a_build_that_fails_is_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "about", lambda commit: {})
    found = [step("raise SystemExit(1)"), step("print('loaded')")]
    assert gpu.run_stage("build", found, {}, options(tmp_path), []) == 1
    assert "loaded\n" not in (tmp_path / "gpu-build.log").read_text().splitlines(keepends=True)


def test_a_suite_that_outruns_its_time_still_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 90)  # a busy machine takes long to write the report
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    slow = "def test_fast(): pass\ndef test_slow():\n    import time; time.sleep(300)\n"
    (tmp_path / "test_slow.py").write_text(slow)
    found = gpu_stages.test_step(sys.executable, [str(tmp_path)], tmp_path / "tests.xml")
    with (tmp_path / "log").open("w") as sink:
        result = gpu.run_step(found, 10, sink)
    assert result.wrong == "stopped after 10 s" and result.status is None
    assert result.numbers["passed"] == 1


def test_a_step_that_outruns_its_time_is_stopped_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE_S", 1)
    code = (
        "import signal, subprocess, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "print('begun', flush=True);"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    with (tmp_path / "log").open("w") as sink:
        result = gpu.run_step(step(code), 1.5, sink)
    assert result.status is None and "stopped after" in result.wrong
    assert result.seconds < 60
    assert "begun" in (tmp_path / "log").read_text()


def test_a_command_that_is_not_there_is_wrong(tmp_path):
    with (tmp_path / "log").open("w") as sink:
        result = gpu.run_step(gpu_stages.Step("none", ["no-such-tool-a3fta"]), 5, sink)
    assert not result.ok and "no-such-tool-a3fta" in result.wrong


CLEAN = "sanitize_case: done, 15 cases\n========= ERROR SUMMARY: 0 errors\n"
OURS = """========= Invalid __global__ read of size 4 bytes
=========     at void a3fta::cuda::down<float>(float const*)+0x110
=========     by thread (0,0,0) in block (0,0,0)
sanitize_case: done, 15 cases
========= ERROR SUMMARY: 1 error
"""
THEIRS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void cublasLt::splitKreduce_kernel<32>(float*)+0x80
=========     by thread (0,0,0) in block (0,0,0)
sanitize_case: done, 15 cases
========= ERROR SUMMARY: 1 error
"""
COPY = """========= Host API uninitialized memory access error on access by cudaMemcpy source
sanitize_case: done, 15 cases
========= ERROR SUMMARY: 1 error
"""
RACE = """========= Error: Race reported between Write access at a3fta::cuda::row_sums(float*)+0x30
=========     and Read access at a3fta::cuda::row_sums(float*)+0x50 [4 hazards]
sanitize_case: done, 15 cases
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("text", "tool", "clean"),
    [
        (CLEAN, "memcheck", True),
        (CLEAN.replace("done", "begun"), "memcheck", False),
        ("========= Error: Device not supported\n", "memcheck", False),
        (OURS, "memcheck", False),
        (THEIRS, "memcheck", False),
        (THEIRS, "initcheck", True),
        (THEIRS.replace("cublasLt", "a3fta"), "initcheck", False),
        (COPY, "initcheck", False),
        (
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards"),
            "racecheck",
            True,
        ),
        (RACE, "racecheck", False),
        (RACE.replace("a3fta", "cub"), "racecheck", True),
    ],
)
def test_what_the_sanitizer_found(text, tool, clean):
    _, wrong = gpu_stages.read_sanitizer(text, tool)
    assert (wrong == "") is clean


def test_the_sanitized_case_runs():
    reason = why_not("native", torch.device("cpu"), torch.float32)
    if reason is not None:
        pytest.skip(f"native on the CPU: {reason}")
    done = run("benchmarks/sanitize_case.py", "--device", "cpu", "--quick")
    assert done.returncode == 0, done.stderr
    assert "sanitize_case: done" in done.stdout


def test_the_sanitized_cases_reach_the_fast_kernels():
    for dtype in (torch.bfloat16, torch.float16):
        for quick in (False, True):
            found = list(sanitize_case.cases(dtype, quick))
            fast = [c for c in found if c.c % 64 == 0 and c.r % 16 == 0]
            assert {c.n is None for c in fast} == {True, False}
        assert {c.r for c in sanitize_case.cases(dtype, False)} >= {16, 64}


@pytest.mark.parametrize("wrong", [False, True])
def test_attention_to_text_is_held_to_the_oracle(monkeypatch, wrong):
    plain = variants.EAGER["cross_attention_adapter"]

    def op(backend: str, **inputs):
        y = plain(**inputs)
        return y.roll(1, 1) if wrong else y

    monkeypatch.setattr(sanitize_case.ops, "cross_attention_adapter", op, raising=False)
    (workload,) = sanitize_case.crosses(torch.bfloat16, quick=True)
    with pytest.raises(AssertionError, match="y: error") if wrong else contextlib.nullcontext():
        sanitize_case.check_cross(workload, ("native", "cpu", torch.bfloat16))


def test_carried_packages(tmp_path):
    assert gpu.prepare_site(None, tmp_path) is None
    assert gpu.prepare_site(tmp_path, tmp_path) == tmp_path
    with pytest.raises(SystemExit, match="--site: expected a folder"):
        gpu.prepare_site(tmp_path / "none", tmp_path)


def test_carried_wheels_are_unpacked(tmp_path):
    import zipfile

    site = tmp_path / "wheels"
    site.mkdir()
    with zipfile.ZipFile(site / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "value = 1\n")
        wheel.writestr(
            "carried-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1\n"
        )
        wheel.writestr(
            "carried-1.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("carried-1.dist-info/RECORD", "")
    target = gpu.prepare_site(site, tmp_path)
    assert (target / "carried.py").read_text() == "value = 1\n"


def test_commands_can_be_pasted(tmp_path):
    for stage in gpu_stages.STAGES:
        for found in gpu_stages.steps(stage, options(tmp_path), "90a", tmp_path):
            words = shlex.split(found.shown())
            assert words[-len(found.command) :] == found.command


def test_a_lost_context_ends_its_process(tmp_path):
    """What follows runs in a new process."""
    cases = tmp_path / "test_cases.py"
    cases.write_text(
        "here = set()\n"
        "def test_first():\n    here.add(1)\n"
        "def test_lost():\n    raise RuntimeError('CUDA error: an illegal memory access was "
        "encountered')\n"
        "def test_after():\n    assert not here\n"
        "def test_plain_failure():\n    assert 0, 'of another kind'\n"
    )
    command = ["-m", "pytest", "-q", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider"]
    done = run(*command, "-c", os.devnull, "--rootdir", str(tmp_path), str(cases), "-n", "1")
    assert "2 failed, 2 passed" in done.stdout
    assert "test_lost: RuntimeError: CUDA error: an illegal memory access" in done.stderr
    assert "test_plain_failure: AssertionError: of another kind" in done.stderr


def test_without_xdist_a_lost_context_ends_the_run():
    reason = "E   RuntimeError: CUDA error: misaligned address"
    report = types.SimpleNamespace(failed=True, nodeid="test_it", longrepr=reason)
    with pytest.raises(pytest.exit.Exception, match="context is lost"):
        gpu_tests.Watch(worker=False).pytest_runtest_logreport(report)
