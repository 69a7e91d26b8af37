"""The demo's results: a table on screen, demo.md and demo.json, and a caption from the numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

TIE = 0.03  # losses closer than this share of each other are called equal: one seed says no more


@dataclass
class Row:
    """One line of the table. None: the column does not apply."""

    key: str
    label: str
    trainable: int | None = None
    steps_per_second: float | None = None
    saved_bytes: int | None = None
    train_loss: float | None = None
    heldout_loss: float | None = None
    copies: float | None = None
    kid: float | None = None
    recall: float | None = None
    legible: float | None = None
    step: int | None = None


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "label": ("method", str),
    "trainable": ("parameters trained", lambda v: f"{v:,}"),
    "steps_per_second": ("steps per second", lambda v: f"{v:.1f}"),
    "saved_bytes": ("saved for backward", lambda v: f"{v / 2**20:.1f} MiB"),
    "train_loss": ("training loss", lambda v: f"{v:.3f}"),
    "heldout_loss": ("held-out loss", lambda v: f"{v:.3f}"),
    "copies": ("near-copies", _share),
    "kid": ("KID (blank = 100)", lambda v: f"{v:.1f}"),
    "recall": ("recall", lambda v: f"{v:.2f}"),
    "legible": ("legible", _share),
}


def cells(row: Row) -> list[str]:
    values = [getattr(row, name) for name in COLUMNS]
    return [
        "-" if v is None or (isinstance(v, float) and math.isnan(v)) else show(v)
        for v, (_, show) in zip(values, COLUMNS.values(), strict=True)
    ]


def notes(samples: int, threshold: float, selection: int, heldout: int) -> list[str]:
    """What the columns mean, for the foot of the table."""
    return [
        f"Losses: denoising error on fixed noise and timesteps; held-out over {heldout} "
        "handwritten digits that no method saw.",
        f"Best step: the step of lowest loss on {selection} further digits, an advantage that the "
        "other rows do not have; with 20 images in all, nobody would have them.",
        "Learning rates: one search with one rule for all methods, on another split of the same "
        "digits, which overlaps this one (scripts/tune_demo.py). They decide how soon each method "
        "overfits, and with that the columns here: try other ones there.",
        "Saved for backward: bytes that autograd keeps in one training step, each storage once, "
        "weights not counted.",
        f"Near-copies: of {samples} samples, those within {threshold:.2f} (pixels, Euclidean) of "
        "a training image. Of real unseen digits, 1 % are that close.",
        "KID: kernel distance to real digits on pixels. Recall: share of real digits within reach "
        "of the samples. Legible: read as the digit asked for by a classifier of real digits.",
    ]


def _relation(a: float, b: float) -> str:
    if abs(a - b) <= TIE * max(a, b):
        return "about the same"
    return "lower" if a < b else "higher"


def _copies(a: float, b: float, samples: int) -> str:
    """Whether share a of `samples` differs from share b by more than two standard errors."""
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / samples)
    if abs(a - b) <= max(2 * error, 1 / samples):
        return "not distinguishable"
    return "fewer" if a < b else "more"


def caption(rows: list[Row], samples: int, seed: int) -> str:
    """What this run shows, in sentences made from its numbers."""
    by = {row.key: row for row in rows}
    ours, before = by["a3fta"], by["base"].heldout_loss
    model = by["full-last"].trainable
    loss, copied = ours.heldout_loss, ours.copies
    assert ours.trainable and model and loss is not None and copied is not None
    said = [
        f"A3FTA trains {ours.trainable:,} parameters ({100 * ours.trainable / model:.1f} % of the "
        f"model): held-out loss {loss:.3f} (before: {before:.3f}), {_share(copied)} near-copies.",
        "Against it:",
    ]
    for rival in (by[key] for key in ("full-best", "full-last", "lora")):
        assert rival.heldout_loss is not None and rival.copies is not None
        said.append(
            f"{rival.label}: {rival.heldout_loss:.3f} ({_relation(rival.heldout_loss, loss)}), "
            f"{_share(rival.copies)} near-copies ({_copies(rival.copies, copied, samples)});"
        )
    said[-1] = said[-1].removesuffix(";") + "."
    trained = [row for row in rows if row.trainable]
    lowest = min(trained, key=lambda row: row.heldout_loss or math.inf)
    closest = min(trained, key=lambda row: math.inf if row.kid is None else row.kid)
    said.append(
        f"Lowest held-out loss: {lowest.label}. Samples closest to real digits by KID: "
        f"{closest.label} ({closest.kid:.1f}, {_share(closest.copies or 0.0)} near-copies)."
    )
    said.append(f"One run with seed {seed} at toy size: it says nothing about large models.")
    return " ".join(said)


def print_table(console: Any, rows: list[Row], title: str) -> None:
    """On screen the methods are the columns, so that 80 characters are enough."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=0)
    (heading, _), *others = COLUMNS.values()
    table.add_column(heading, no_wrap=True)
    for row in rows:
        bold = "bold" if row.key == "a3fta" else ""
        table.add_column(row.label, justify="right", style=bold, header_style=bold)
    columns = [cells(row)[1:] for row in rows]
    for (name, _), *values in zip(others, *columns, strict=True):
        table.add_row(name, *values)
    console.print(table)


def write(
    folder: Path, rows: list[Row], text: str, footnotes: list[str], facts: dict[str, Any],
    curves: dict[str, Any],
) -> None:  # fmt: skip
    """demo.md for people, demo.json for programs."""
    heads = [heading for heading, _ in COLUMNS.values()]
    lines = ["# a3fta demo", "", text, "", "![demo](demo.png)", ""]
    lines += [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    lines += ["", *(f"- {note}" for note in footnotes), ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    (folder / "demo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = {
        "facts": facts,
        "caption": text,
        "rows": [vars(row) for row in rows],
        "notes": footnotes,
        "losses": curves,
    }
    (folder / "demo.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass
class Shown:
    """Samples of one method as the picture shows them."""

    samples: Tensor
    nearest: Tensor
    copied: Tensor
