"""REPORT.md on calls without gradients: the results of bench_inference.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import report_figures as figures
from .report_figures import Bar
from .report_text import mib, place, slug, source

STEM = "inference_"
_OURS = "A3FTA"

Row = dict[str, Any]


def sections(found: dict[str, Any], stem: str, out: Path) -> Iterator[str]:
    about = found["environment"]
    on = place(about)
    for model, rows in _by_model(found).items():
        yield f"\n## A call of the denoiser: {model}, on {on}\n"
        compared = [row for row in rows if row["of_frozen"]]
        if len(compared) > 1:
            name = f"inference-{stem}-{slug(model)}.png"
            title = f"{model}: time of a call, without gradients ({on})"
            figures.bars(
                out / name, title, source(about), [("", [_bar(row) for row in compared])],
                "time over the frozen base's  (left is faster)", line=1.0,
            )  # fmt: skip
            yield f"![bars: calls of {model} over the frozen base's](figures/{name})\n"
        if rows:
            yield from _table(rows, about)
        absent = [row for row in found["absent"] if _name(row) == model]
        if absent:
            yield "\nNot measured:\n"
            yield from (f"- {row['cell']}: {row['reason']}" for row in absent)


def _by_model(found: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows of every model, also of one that has none."""
    models: dict[str, list[Row]] = {_name(row): [] for row in (*found["rows"], *found["absent"])}
    for row in found["rows"]:
        models[_name(row)].append(row)
    return models


def _name(row: Row) -> str:
    return f"{row['model']}, batch {row['batch_size']}"


def _bar(row: Row) -> Bar:
    cell, ratio = row["cell"], row["of_frozen"]
    colour = figures.OURS if cell.startswith(_OURS) else figures.LORA
    return cell, ratio, figures.GREY if ratio == 1 else colour, f"{ratio:.2f}"


def _table(rows: list[Row], about: dict[str, Any]) -> Iterator[str]:
    counted = "kernels" if "capability" in about else "operators"
    yield (
        "| | call, ms | 20 % to 80 % | over the frozen base | images/s at 30 calls | peak, MiB | "
        f"{counted} |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        low, mid, high = (row[f"q{share}_us"] / 1e3 for share in (20, 50, 80))
        cells = [
            row["cell"], f"{mid:.1f}", f"{low:.1f} to {high:.1f}",
            f"{row['of_frozen']:.2f}" if row["of_frozen"] else "",
            f"{row['images_per_second']:.3g}", mib(row["peak_bytes"]),
            str(row.get("counts", {}).get(counted, "")),
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"
    loops = sorted({row["rounds"] for row in rows})
    yield (
        f"\nThe denoiser alone, {rows[0]['dtype']}; a peak is above the weights; medians of "
        f"{' or '.join(map(str, loops))} rounds, every cell one call a round. {source(about)}.\n"
    )
