"""csrc/cuda/ on the CPU under sanitizers: out-of-bounds accesses, missing barriers and races.

A file of its own, so that it runs beside the results of test_cuda_emulated.py.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ..cuda_emulator.build import COMPILER, build_program

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ not found: no emulated kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs ucontext on Linux"),
    pytest.mark.timeout(600),
]
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


@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD])
def test_sanitizers(sanitizers, tmp_path):
    program = clean_program(build_program, tmp_path, sanitizers)
    for mistake, by, finding in PLANTED:
        if by in (None, sanitizers):
            broken = run(program, mistake)
            assert broken.returncode != 0, mistake
            assert finding in broken.stderr, broken.stderr


def clean_program(build: Callable[[Path, str], Path], folder: Path, sanitizers: str) -> Path:
    """The program, which has run clean; skips where there is no such sanitizer."""
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    links = subprocess.run(
        [COMPILER, f"-fsanitize={sanitizers}", str(probe), "-o", str(folder / "probe")],
        capture_output=True, text=True,
    )  # fmt: skip
    if links.returncode != 0:
        pytest.skip(f"g++ has no {sanitizers} sanitizer here: {links.stderr.strip()[:200]}")
    program = build(folder, sanitizers)
    clean = run(program)
    if "unexpected memory mapping" in clean.stderr:
        pytest.skip("ThreadSanitizer does not know this kernel's memory layout")
    assert clean.returncode == 0 and clean.stdout == "clean\n", clean.stdout + clean.stderr
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Without address-space randomisation where that can be had: ThreadSanitizer wants it so."""
    fixed = [shutil.which("setarch"), platform.machine(), "-R"]
    probe = fixed[0] and subprocess.run([*fixed, "true"], capture_output=True).returncode == 0
    return subprocess.run(
        [*(fixed if probe else []), str(program), *arguments], capture_output=True, text=True
    )
