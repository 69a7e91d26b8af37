"""demo.png: training images, samples before and after, their nearest neighbours, loss curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from torch import Tensor

from .report import Row, Shown
from .training import Losses

COLOURS = {"a3fta": "#0b6e99", "full": "#c4552d", "lora": "#6b7f3a"}
INK, MUTED, COPY, PAPER, EDGE = "#1f2328", "#667078", "#d1242f", "#fbfaf7", "#d8d5cd"
TILE, GAP = 0.62, 0.12  # inches, like everything below
HEAD = 0.50  # a heading with its line of small print
PAIR = 2 * TILE + 0.27  # a row of samples over a row of their nearest
CURVE = 2.2
START = 1.25  # below the title
COLUMN = 10 * TILE + 9 * GAP
MARGIN, GUTTER = 0.55, 0.85
WIDTH = 2 * MARGIN + 2 * COLUMN + GUTTER
CURVES = START + 3 * HEAD + 4 * (TILE + GAP) + 2 * PAIR + 0.45  # below the left column
FOOT = CURVES + CURVE + 1.27
LINE = 0.23


class _Page:
    """Places things in inches from the top left, so that text and tiles cannot collide."""

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), facecolor=PAPER)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        top = self.height - y - height
        return self.figure.add_axes(
            (x / WIDTH, top / self.height, width / WIDTH, height / self.height)
        )

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        style = {"color": INK, "fontsize": 11, "va": "top", "ha": "left", **style}
        self.figure.text(x / WIDTH, 1 - y / self.height, words, **style)

    def tiles(self, x: float, y: float, images: Tensor, red: Tensor | None = None) -> None:
        """One row of ten."""
        for i, image in enumerate(images):
            ax = self.axes(x + i * (TILE + GAP), y, TILE, TILE)
            ax.imshow(image[0].numpy(), cmap="Greys", vmin=-1, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            marked = red is not None and bool(red[i])
            for spine in ax.spines.values():
                spine.set(color=COPY if marked else EDGE, linewidth=2.4 if marked else 0.8)


def _heading(page: _Page, x: float, y: float, title: str, aside: str, colour: str = INK) -> float:
    page.text(x, y, title, fontsize=12.5, fontweight="bold", color=colour)
    page.text(x, y + 0.24, aside, fontsize=10, color=MUTED)
    return y + HEAD


def _pairs(page: _Page, x: float, y: float, shown: Shown, rows: int) -> float:
    """Rows of samples, each over the row of their nearest training images."""
    for r in range(rows):
        part = slice(10 * r, 10 * (r + 1))
        page.tiles(x, y, shown.samples[part], shown.copied[part])
        y += TILE + 0.05
        page.tiles(x, y, shown.nearest[part])
        page.text(x - 0.07, y - TILE / 2 - 0.05, "sample", fontsize=8, color=MUTED, rotation=90,
                  ha="right", va="center")  # fmt: skip
        page.text(x - 0.07, y + TILE / 2, "nearest", fontsize=8, color=MUTED, rotation=90,
                  ha="right", va="center")  # fmt: skip
        y += PAIR - TILE - 0.05
    return y


def _curves(
    page: _Page, x: float, y: float, title: str, part: str,
    losses: dict[str, Losses], labels: dict[str, str], best: dict[str, int], top: float,
) -> None:  # fmt: skip
    ax = page.axes(x + 0.3, y + 0.62, COLUMN - 0.3, CURVE)
    page.text(x, y, title, fontsize=12.5, fontweight="bold")
    for key, curve in losses.items():
        values = getattr(curve, part)
        ax.plot(curve.steps, values, color=COLOURS[key], linewidth=2.2, label=labels[key])
        if part == "heldout" and key in best:
            i = curve.steps.index(best[key])
            ax.plot(best[key], values[i], "o", color=COLOURS[key], markersize=8,
                    markeredgecolor=PAPER, label="its best step on other digits")  # fmt: skip
    ax.set_facecolor(PAPER)
    ax.set_ylim(0, top)
    ax.set_xlabel("step", color=MUTED, fontsize=9.5)
    ax.tick_params(colors=MUTED, labelsize=9, length=3)
    ax.grid(axis="y", color=EDGE, linewidth=0.7)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(EDGE)
    ax.legend(frameon=False, fontsize=10, labelcolor=INK, ncols=4, columnspacing=1.4,
              handlelength=1.4, loc="lower left", bbox_to_anchor=(-0.052, 0.99))  # fmt: skip


def draw(
    path: Path, real: Tensor, before: Tensor, after: dict[str, Shown], rows: list[Row],
    losses: dict[str, Losses], labels: dict[str, str], best: dict[str, int], text: str,
) -> None:  # fmt: skip
    """Writes the picture.

    Args:
        path: where to.
        real: the 20 training images, (20, 1, 8, 8), in two rows of the ten digits.
        before: 20 samples of the base.
        after: samples by row key; "a3fta" has 20, the others 10.
        rows: the table, for the numbers beside the headings.
        losses, labels, best: by method: curves, names, best step.
        text: the caption.
    """
    by = {row.key: row for row in rows}
    lines = textwrap.wrap(text, 195)
    page = _Page(FOOT + LINE * len(lines) + 0.3)
    left, right = MARGIN, MARGIN + COLUMN + GUTTER
    page.text(left, 0.32, "Twenty handwritten digits, one small adapter", fontsize=20,
              fontweight="bold")  # fmt: skip
    page.text(left, 0.74, "A diffusion model that has only seen printed digits is adapted to "
              "handwriting, from two examples per class.", fontsize=12, color=MUTED)  # fmt: skip

    y = _heading(page, left, START, "The training set", "all 20 images")
    y = _rows(page, left, y, real) + 0.12
    y = _heading(page, left, y, "Before", "samples of the base, which was trained on fonts")
    y = _rows(page, left, y, before) + 0.12
    y = _heading(page, left, y, "After A3FTA", _aside(by["a3fta"]), COLOURS["a3fta"])
    _pairs(page, left, y, after["a3fta"], 2)

    y = START
    for key, colour in (("full-best", "full"), ("full-last", "full"), ("lora", "lora")):
        row = by[key]
        y = _heading(page, right, y, row.label[0].upper() + row.label[1:], _aside(row),
                     COLOURS[colour])  # fmt: skip
        y = _pairs(page, right, y, after[key], 1) + 0.14
    _legend(page, right, y + 0.05)

    top = 1.08 * max(max(curve.heldout + curve.train) for curve in losses.values())
    for x, title, part in (
        (left, "Loss on the 20 training images", "train"),
        (right, "Loss on held-out digits", "heldout"),
    ):
        _curves(page, x, CURVES, title, part, losses, labels, best, top)
    for i, line in enumerate(lines):
        page.text(left, FOOT + LINE * i, line, fontsize=11)
    page.figure.savefig(path, dpi=110, facecolor=PAPER)


def _aside(row: Row) -> str:
    assert row.trainable is not None and row.copies is not None
    return (
        f"{row.trainable:,} parameters trained · held-out loss {row.heldout_loss:.3f} · "
        f"{100 * row.copies:.0f} % near-copies"
        + (" · stopped by other real digits" if row.key == "full-best" else "")
    )


def _rows(page: _Page, x: float, y: float, images: Tensor) -> float:
    for row in images.split(10):
        page.tiles(x, y, row)
        y += TILE + GAP
    return y


def _legend(page: _Page, x: float, y: float) -> None:
    ax = page.axes(x, y, 0.24, 0.24)
    ax.set(xticks=[], yticks=[], facecolor=PAPER)
    for spine in ax.spines.values():
        spine.set(color=COPY, linewidth=2.4)
    page.text(x + 0.36, y + 0.12, "a near-copy: closer to a training image than 99 % of real, "
              "unseen digits are", fontsize=10, color=MUTED, va="center")  # fmt: skip
