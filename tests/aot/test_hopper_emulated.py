"""The Hopper kernel's own source on the CPU, under sanitizers, and what they and the emulator find.

Its results are held to the oracle in test_cuda_emulated.py.
"""

from __future__ import annotations

import sys

import pytest

from ..cuda_emulator.build import COMPILER, build_hopper_program
from .test_cuda_sanitizers import ADDRESS, THREAD, clean_program, run

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="g++ not found: no emulated kernels"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs ucontext on Linux"),
    pytest.mark.timeout(600),
]
# mistakes of sanitize_hopper.cpp, and what shows each under one sanitizer and under the other
PLANTED = {
    "none": ("right", "right"),
    "unmade_barriers": ("was not published", "was not published"),
    "no_syncthreads": (None, "data race"),
    "unwaited_load": ("a tensor copy that nobody waited for", "data race"),
    "early_release": ("wrong", "data race"),
    "never_released": ("wait for each other for ever", "wait for each other for ever"),
    "no_fence": ("products without a fence", "products without a fence"),
    "unwaited_product": ("wrong", "wrong"),
    "two_shapes": ("two shapes at work", "two shapes at work"),
    "one_thread_less": ("a warpgroup whose threads part", "a warpgroup whose threads part"),
    "other_stride": ("use-after-poison", "data race"),
}


@pytest.mark.parametrize("sanitizers", [ADDRESS, THREAD])
def test_sanitizers(sanitizers, tmp_path):
    program = clean_program(build_hopper_program, tmp_path, sanitizers)
    for mistake, findings in PLANTED.items():
        finding = findings[sanitizers == THREAD]
        if finding is not None:
            planted = run(program, mistake)
            assert finding in planted.stdout + planted.stderr, mistake
            assert (planted.returncode == 0) == (finding in ("right", "wrong")), mistake
