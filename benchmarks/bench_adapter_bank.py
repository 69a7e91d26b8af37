"""`ops.adapter_bank`: every backend against eager, loops, stacks, PEFT's mixed batches, a clone."""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_adapter_bank(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
