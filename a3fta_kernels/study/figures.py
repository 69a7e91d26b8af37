"""The study's pictures: KID against copies over steps, curves, and grids of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .methods import BASELINE, METHODS
from .statistics import interval
from .views import Run

COLOURS = {
    "base": "#667078", "full": "#c4552d", "attention": "#8a5aa8", "l2sp": "#d9a03f",
    "lora": "#6b7f3a", "identity": "#7fb3c8", "gelu": "#0b6e99", "film": "#123f5c",
    "adapter+attention": "#b0477f",
}  # fmt: skip
INK, MUTED, PAPER, EDGE = "#1f2328", "#667078", "#fbfaf7", "#d8d5cd"
_SHOWN = 20  # samples in a row of the grid

# method -> runs of one k
ByMethod = Mapping[str, Sequence[Run]]


def _page(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.set_facecolor(PAPER)
        ax.tick_params(colors=MUTED, labelsize=9, length=3)
        ax.grid(color=EDGE, linewidth=0.7)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(EDGE)
    return figure, axes


def _mean(runs: Sequence[Run], metric: str, scale: float = 1.0) -> tuple[list[float], ...]:
    """Per checkpoint the mean over seeds and its 95 % interval."""
    columns = list(zip(*(run.curves[metric] for run in runs), strict=True))
    means = [scale * math.fsum(c) / len(c) for c in columns]
    bounds = [interval([scale * v for v in c]) for c in columns]
    return means, [low for low, _ in bounds], [high for _, high in bounds]


def trained(runs: ByMethod) -> dict[str, Sequence[Run]]:
    return {name: runs[name] for name in METHODS if name != BASELINE and runs.get(name)}


def headline(path: Path, runs: ByMethod, kid_scale: float, chance: float, title: str) -> None:
    """KID against the share of near-copies: a path over steps per method, from a small mark at
    the first checkpoint to a large one at the last; shaded, the 95 % intervals of KID."""
    figure, (ax,) = _page(9, 5.6)
    for name, found in trained(runs).items():
        x, _, _ = _mean(found, "copies", 100)
        y, low, high = _mean(found, "kid", kid_scale)
        _, left, right = _mean(found, "copies", 100)
        colour = COLOURS[name]
        _ribbon(ax, (x, left, right), (y, low, high), colour)
        ax.plot(x, y, color=colour, linewidth=2, label=METHODS[name].label, zorder=3)
        ax.plot(x[0], y[0], "o", color=colour, markersize=4, zorder=4)
        ax.plot(x[-1], y[-1], "o", color=colour, markersize=9, markeredgecolor=PAPER, zorder=4)
    ax.axvline(100 * chance, color=MUTED, linewidth=1, linestyle=":")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_xlabel("near-copies among samples, % (dotted: among real images)", color=INK)
    ax.set_ylabel("KID, % of the base's", color=INK)
    ax.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    ax.legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path, dpi=110, facecolor=PAPER)


def _ribbon(ax: Any, x: tuple[list[float], ...], y: tuple[list[float], ...], colour: str) -> None:
    """An ellipse per checkpoint, of both intervals, joined along the path."""
    from matplotlib.patches import Ellipse

    for mx, lx, hx, my, ly, hy in zip(*x, *y, strict=True):
        if math.isfinite(hx - lx) and math.isfinite(hy - ly):
            size = max(hx - lx, 0.1), max(hy - ly, 0.05)
            ax.add_patch(Ellipse((mx, my), *size, color=colour, alpha=0.13, linewidth=0))


def curves(path: Path, runs: ByMethod, kid_scale: float) -> None:
    """Held-out loss, training loss, KID and recall over steps."""
    panels = (
        ("heldout", "held-out loss", 1.0), ("train", "training loss", 1.0),
        ("kid", "KID, % of the base's", kid_scale), ("recall", "recall, %", 100.0),
        ("copies", "near-copies, %", 100.0),
    )  # fmt: skip
    figure, axes = _page(18, 3.8, len(panels))
    for ax, (metric, title, scale) in zip(axes, panels, strict=True):
        for name, found in trained(runs).items():
            mean, low, high = _mean(found, metric, scale)
            ax.fill_between(found[0].steps, low, high, color=COLOURS[name], alpha=0.12, linewidth=0)
            ax.plot(found[0].steps, mean, color=COLOURS[name], linewidth=1.8,
                    label=METHODS[name].label)  # fmt: skip
        ax.set_title(title, loc="left", color=INK, fontsize=11)
        ax.set_xlabel("step", color=MUTED)
        if metric == "kid":
            ax.set_yscale("symlog", linthresh=1)
    axes[-1].legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.savefig(path, dpi=100, facecolor=PAPER)


def keep_samples(path: Path, drawn: Mapping[int, Sequence[Any]], train: Sequence[Any]) -> None:
    """A row of samples per checkpoint, the first the training images, as one PNG."""
    from PIL import Image

    rows = [list(train)[:_SHOWN], *(list(drawn[step])[:_SHOWN] for step in sorted(drawn))]
    width, height = rows[0][0].size
    sheet = Image.new(rows[0][0].mode, (_SHOWN * width, len(rows) * height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def grids(path: Path, folder: Path, runs: ByMethod) -> None:
    """Of every method whose samples were kept: training images, then samples at the step that
    folds chose and at the last."""
    from PIL import Image

    rows: list[tuple[str, Any]] = []
    for name in METHODS:
        sheet = folder / f"{name}.png"
        if not sheet.exists() or not runs.get(name):
            continue
        run, image = runs[name][0], np.asarray(Image.open(sheet))
        side = image.shape[1] // _SHOWN  # images are squares
        lines = [image[i : i + side] for i in range(0, len(image), side)]
        if not rows:
            rows.append(("training images", lines[0]))
        for what, step in (("stopped early", run.early), ("last step", run.steps[-1])):
            if name != BASELINE or what == "last step":
                label = f"{METHODS[name].label}, {what} ({step})"
                rows.append((label, lines[1 + run.steps.index(step)]))
    figure, _ = _page(9.5, 0.36 * len(rows) + 0.2)
    figure.clf()
    for ax, (label, line) in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows, strict=True):
        ax.imshow(line, cmap="Greys_r" if line.ndim == 2 else None, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, color=INK)
        for spine in ax.spines.values():
            spine.set_color(EDGE)
    figure.savefig(path, dpi=110, facecolor=PAPER)
