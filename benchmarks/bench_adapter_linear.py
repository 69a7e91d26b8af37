"""`ops.adapter_linear`: every backend and path against eager and PEFT's LoRA.

`frozen` is the projection without any adapter, which no variant can beat; `read` is one pass over
dy and h at the speed of a copy.
"""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_adapter_linear(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
