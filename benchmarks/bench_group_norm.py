"""`ops.group_norm` with silu, in both memory formats: ours, eager, torch.compile, and a clone."""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_group_norm(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
