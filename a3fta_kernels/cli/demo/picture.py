"""demo.png: training images, samples before and after, their nearest neighbours, loss curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .report import Row, Shown
from .training import Losses

COLOURS = {"a3fta": "#0b6e99", "full": "#c4552d", "lora": "#6b7f3a", "base": "#8a8a8a"}
INK, MUTED, COPY, PAPER, EDGE = "#1f2328", "#667078", "#d1242f", "#fbfaf7", "#d8d5cd"
TILE, GAP = 0.50, 0.11  # inches
COLUMN = 10 * TILE + 9 * GAP
MARGIN, GUTTER = 0.55, 0.85
WIDTH = 2 * MARGIN + 2 * COLUMN + GUTTER


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
            ax.imshow(image[0], cmap="Greys", vmin=-1, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            marked = red is not None and bool(red[i])
            for spine in ax.spines.values():
                spine.set(color=COPY if marked else EDGE, linewidth=2.4 if marked else 0.8)


def _heading(page: _Page, x: float, y: float, title: str, aside: str, colour: str = INK) -> float:
    page.text(x, y, title, fontsize=12.5, fontweight="bold", color=colour)
    page.text(x, y + 0.24, aside, fontsize=9.5, color=MUTED)
    return y + 0.50


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
        y += TILE + 0.2
    return y


def _curves(
    page: _Page, x: float, y: float, height: float, title: str, part: str,
    losses: dict[str, Losses], labels: dict[str, str], best: dict[str, int], top: float,
) -> None:  # fmt: skip
    ax = page.axes(x + 0.3, y + 0.35, COLUMN - 0.3, height)
    page.text(x, y, title, fontsize=12.5, fontweight="bold")
    for key, curve in losses.items():
        values = getattr(curve, part)
        ax.plot(curve.steps, values, color=COLOURS[key], linewidth=2.2, label=labels[key])
        if part == "heldout" and key in best:
            i = curve.steps.index(best[key])
            ax.plot(best[key], values[i], "o", color=COLOURS[key], markersize=8,
                    markeredgecolor=PAPER, label=f"{labels[key]}, best step")  # fmt: skip
    ax.set_facecolor(PAPER)
    ax.set_ylim(0, top)
    ax.set_xlabel("step", color=MUTED, fontsize=9.5)
    ax.tick_params(colors=MUTED, labelsize=9, length=3)
    ax.grid(axis="y", color=EDGE, linewidth=0.7)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(EDGE)
    ax.legend(frameon=False, fontsize=9.5, labelcolor=INK, loc="upper right")


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
    lines = _wrapped(text, 150)
    foot = 0.35 + 0.21 * len(lines)
    page = _Page(10.55 + foot)
    left, right = MARGIN, MARGIN + COLUMN + GUTTER
    page.text(left, 0.32, "Twenty handwritten digits, one small adapter", fontsize=19,
              fontweight="bold")  # fmt: skip
    page.text(left, 0.72, "A diffusion model that has only seen printed digits learns handwriting "
              "from two examples per class.", fontsize=11.5, color=MUTED)  # fmt: skip
    start = 1.25

    y = _heading(page, left, start, "The training set", "all 20 images")
    for r in range(2):
        page.tiles(left, y, real[10 * r : 10 * (r + 1)])
        y += TILE + GAP
    y = _heading(page, left, y + 0.15, "Before", "samples of the base, pre-trained on fonts")
    for r in range(2):
        page.tiles(left, y, before[10 * r : 10 * (r + 1)])
        y += TILE + GAP
    y = _heading(page, left, y + 0.15, "After A3FTA", _aside(by["a3fta"]), COLOURS["a3fta"])
    _pairs(page, left, y, after["a3fta"], 2)

    y = start
    for key, colour in (("full-best", "full"), ("full-last", "full"), ("lora", "lora")):
        row = by[key]
        title = row.label[0].upper() + row.label[1:]
        y = _heading(page, right, y, title, _aside(row), COLOURS[colour])
        y = _pairs(page, right, y, after[key], 1) + 0.12
    page.tiles(right, y + 0.1, after["full-last"].samples[:0])
    y = _legend(page, right, y + 0.05)

    y = 7.85
    top = 1.08 * max(max(curve.heldout + curve.train) for curve in losses.values())
    _curves(page, left, y, 1.95, "Training loss", "train", losses, labels, best, top)
    _curves(page, right, y, 1.95, "Held-out loss", "heldout", losses, labels, best, top)
    for i, line in enumerate(lines):
        page.text(left, 10.75 + 0.21 * i, line, fontsize=10)
    page.figure.savefig(path, dpi=110, facecolor=PAPER)


def _aside(row: Row) -> str:
    assert row.trainable is not None and row.copies is not None
    return (
        f"{row.trainable:,} parameters trained · held-out loss {row.heldout_loss:.3f} · "
        f"{100 * row.copies:.0f} % near-copies"
    )


def _legend(page: _Page, x: float, y: float) -> float:
    ax = page.axes(x, y, 0.22, 0.22)
    ax.set(xticks=[], yticks=[], facecolor=PAPER)
    for spine in ax.spines.values():
        spine.set(color=COPY, linewidth=2.4)
    page.text(x + 0.34, y + 0.02, "a near-copy: closer to a training image than 99 % of real, "
              "unseen digits are", fontsize=9.5, color=MUTED)  # fmt: skip
    return y + 0.4


def _wrapped(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)
