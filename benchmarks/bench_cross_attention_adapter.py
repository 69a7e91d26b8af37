"""`ops.cross_attention_adapter`: attention to text, the adapter and the projection.

Against PyTorch's attention followed by the eager adapter, by our `adapter_linear` or by PEFT's
LoRA; `frozen` has no adapter. The gradient goes to the queries, not to the text.
"""

from __future__ import annotations

import pytest

from .harness import Entry, Runner, clock, report


@pytest.mark.benchmark(timer=clock)
def test_cross_attention_adapter(entry: Entry, benchmark, runner: Runner) -> None:
    report(entry, benchmark, runner)
