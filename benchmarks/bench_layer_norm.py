"""`ops.layer_norm`: every backend against eager, torch.compile and a clone of as many bytes."""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_layer_norm(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
