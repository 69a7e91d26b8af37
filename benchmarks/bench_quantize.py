"""`ops.quantize` and `ops.dequantize`, there and back: every backend, eager and torch.compile."""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_quantize(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
