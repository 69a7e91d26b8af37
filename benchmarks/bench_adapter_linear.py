"""`ops.adapter_linear`: every backend and path against eager PyTorch and torch.compile.

`linear` is the frozen projection without any adapter: what no variant can beat.
"""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_adapter_linear(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
