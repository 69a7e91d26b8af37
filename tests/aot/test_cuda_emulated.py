"""csrc/cuda/ on the CPU: the kernels' own source, compiled with a stand-in for CUDA.

Results against the float64 oracle; test_cuda_sanitizers.py looks at accesses and barriers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..cuda_emulator.build import COMPILER, build_library

pytestmark = [
    pytest.mark.xdist_group("emulated"),
    pytest.mark.skipif(COMPILER is None, reason="g++ not found: no emulated kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs ucontext on Linux"),
    pytest.mark.timeout(600),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build_library(tmp_path_factory.mktemp("emulated"))


@pytest.mark.parametrize(
    "module", ["run_ops", "run_bank", "run_hopper", "run_elementwise", "run_norms"]
)
def test_results(module, library):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.cuda_emulator.{module}", str(library)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 0 failed" in done.stdout
