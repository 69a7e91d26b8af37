"""REPORT.md on the largest batch in a memory: the results of bench_largest.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .report_text import mib, place, source

STEM = "largest_"


def section(found: dict[str, Any]) -> Iterator[str]:
    about = found["environment"]
    yield f"\n## The largest batch in a memory, on {place(about)}\n"
    yield "| | level | predicted | found | peak, MiB | CUDA itself, MiB |"
    yield "|---|---|---:|---:|---:|---:|"
    for row in found["rows"]:
        cells = [
            f"{row['model']}, {row['gib']} GiB", row["level"], str(row["batch"]),
            str(row["largest"]), mib(row["peak_bytes"]), mib(row["context_bytes"]),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    yield (
        "\nA3FTA with r = 64, bf16, AdamW; PyTorch had the memory less what CUDA takes. Predicted "
        f"by `a3fta plan`; found to a 32nd of that. {source(about)}.\n"
    )
    absent = found["absent"]
    if absent:
        yield "Not measured:\n"
        yield from (f"- {r['model']}, {r['gib']} GiB, {r['level']}: {r['reason']}" for r in absent)
