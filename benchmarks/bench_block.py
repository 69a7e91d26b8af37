"""A transformer block of SD1.5 and SDXL, by diffusers, with adapters by every backend.

No op: what a whole layer of a model gains. Against the eager adapters and PEFT's LoRA on the same
layers; `frozen` is the block without any adapter. Kernels and host time stand in the rows.
"""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report

pytest.importorskip("diffusers")


@pytest.mark.benchmark(timer=clock)
def test_block(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
