"""csrc/cuda/ on the CPU: the kernels' own source, compiled with a stand-in for CUDA.

Results against the float64 oracle; out-of-bounds accesses and missing barriers by sanitizers.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..cuda_emulator.build import COMPILER, build_library, build_program

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ not found: no emulated kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs ucontext on Linux"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]
ADDRESS, THREAD = "address,undefined", "thread"
# the mistakes of planted.cpp, the sanitizer that sees it (None: the emulator itself), and its words
PLANTED = [
    ("neighbour", ADDRESS, "use-after-poison"),
    ("neighbour", THREAD, "data race"),
    ("matrices", THREAD, "data race"),
    ("copies", THREAD, "data race"),
    ("remote", THREAD, "data race"),
    ("unread", THREAD, "data race"),
    ("remote_end", ADDRESS, "use-after-poison"),
    ("lanes", None, "lanes of a warp part"),
    ("unwaited", None, "copies that nobody waited for"),
    ("half_a_barrier", None, "a barrier of the cluster that not all threads reach"),
    ("lost", None, "bytes not sent"),
    ("arrival", None, "a cluster barrier that nobody waited for"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize("module", ["run_ops", "run_hopper", "run_elementwise", "run_norms"])
def test_results(module, library):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.cuda_emulator.{module}", str(library)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout


@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD])
def test_sanitizers(sanitizers, tmp_path):
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    links = subprocess.run(
        [COMPILER, f"-fsanitize={sanitizers}", str(probe), "-o", str(tmp_path / "probe")],
        capture_output=True, text=True,
    )  # fmt: skip
    if links.returncode != 0:
        pytest.skip(f"g++ has no {sanitizers} sanitizer here: {links.stderr.strip()[:200]}")
    program = build_program(tmp_path, sanitizers)
    clean = run(program)
    if "unexpected memory mapping" in clean.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's memory layout")
    assert clean.returncode == 0 and clean.stdout == "clean\n", clean.stdout + clean.stderr
    for mistake, by, finding in PLANTED:
        if by in (None, sanitizers):
            broken = run(program, mistake)
            assert broken.returncode != 0, mistake
            assert finding in broken.stderr, broken.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without address-space randomisation where that can be had: ThreadSanitizer wants it so."""
    fixed = [shutil.which("setarch"), platform.machine(), "-R"]
    probe = fixed[0] and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return subprocess.run(
        [*(fixed if probe else []), str(program), *arguments], capture_output=True, text=True
    )
