"""The study's pictures: KID against copies over steps, curves, and grids of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
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
# of a search's candidates, in turn
_OTHERS = (
    "#4c78a8", "#e45756", "#54a24b", "#b79a20", "#9d755d", "#bab0ac", "#72b7b2", "#ff9da6",
    "#5b4fa0", "#1b7f5c", "#d16ba5", "#2f3b45",
)  # fmt: skip
INK, MUTED, PAPER, EDGE = "#1f2328", "#667078", "#fbfaf7", "#d8d5cd"
_ENOUGH = 4  # seeds, for an interval that is worth drawing
_MANY = 10  # methods, of which the intervals hide each other and the names the paths
_SHOWN = 20  # samples in a row of the grid

# method -> runs of one k
ByMethod = Mapping[str, Sequence[Run]]


def _colours(runs: ByMethod) -> dict[str, str]:
    """Candidates that are drawn together differ."""
    others = [name for name in METHODS if name in runs and name not in COLOURS]
    return COLOURS | {name: _OTHERS[i % len(_OTHERS)] for i, name in enumerate(others)}


def _shaded(runs: ByMethod) -> bool:
    found = trained(runs)
    return len(found) <= _MANY and all(len(one) >= _ENOUGH for one in found.values())


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
    the first checkpoint to a large one at the last, a square where folds say to stop; shaded, from
    four seeds on and to ten methods, the 95 % intervals of both. Methods with the same runs, as
    two that were given one learning rate, share a path."""
    crowded = len(trained(runs)) > _MANY
    figure, (ax,) = _page(12 if crowded else 9, 6)
    colours = _colours(runs)
    paths = []
    for names, found in _alike(runs):
        x, y = _mean(found, "copies", 100), _mean(found, "kid", kid_scale)
        colour, label = colours[names[0]], " = ".join(METHODS[name].label for name in names)
        paths.append((x, y, colour))
        ax.plot(x[0], y[0], color=colour, linewidth=2, label=label, zorder=3)
        ax.plot(x[0][0], y[0][0], "o", color=colour, markersize=4, zorder=4)
        ax.plot(x[0][-1], y[0][-1], "o", color=colour, markersize=10, markeredgecolor=PAPER,
                zorder=5)  # fmt: skip
        early = [
            math.fsum(scale * run.at(metric, run.early) for run in found) / len(found)
            for metric, scale in (("copies", 100.0), ("kid", kid_scale))
        ]
        ax.plot(*early, "s", color=colour, markersize=7, markeredgecolor=PAPER, zorder=5)
    ax.axvline(100 * chance, color=MUTED, linewidth=1, linestyle=":")
    ax.set_xscale("symlog", linthresh=2)
    ax.set_yscale("symlog", linthresh=2)
    _plain(ax.xaxis)
    _plain(ax.yaxis)
    ax.set_xlim(left=-0.2)
    lowest = min(min(y[0]) for _, y, _ in paths)
    if lowest > 0:
        ax.set_ylim(bottom=0.85 * lowest)
    # the paths say how far the axes go
    ax.autoscale(False)
    if _shaded(runs):
        for x, y, colour in paths:
            _ribbon(ax, x, y, colour)
    ax.set_xlabel("near-copies among samples, % (dotted: among real images)", color=INK)
    ax.set_ylabel("KID, % of the base's", color=INK)
    ax.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if crowded else {}
    ax.legend(
        facecolor=PAPER, edgecolor=PAPER, framealpha=0.8, fontsize=9, labelcolor=INK, **beside
    )
    figure.savefig(path, dpi=110, facecolor=PAPER)


def _alike(runs: ByMethod) -> list[tuple[list[str], Sequence[Run]]]:
    """The methods, those together whose runs came out the same, and the runs."""
    groups: dict[Any, tuple[list[str], Sequence[Run]]] = {}
    for name, found in trained(runs).items():
        key = tuple(tuple(run.curves[m]) for run in found for m in ("copies", "kid"))
        groups.setdefault(key, ([], found))[0].append(name)
    return list(groups.values())


def _plain(axis: Any) -> None:
    """Round numbers, written as they are, on an axis of which most is logarithmic."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axis.set_major_locator(FixedLocator([0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(ScalarFormatter())


def _ribbon(ax: Any, x: Sequence[list[float]], y: Sequence[list[float]], colour: str) -> None:
    """Ellipses of both intervals at the checkpoints, each joined with the next, as one area."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Outline
    from scipy.spatial import ConvexHull

    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    ellipses = [
        # one without a width would have no hull
        np.stack(
            [
                (left + right) / 2 + ((right - left) / 2 + 0.02) * np.cos(turns),
                (low + high) / 2 + ((high - low) / 2 + 0.02) * np.sin(turns),
            ],
            axis=1,
        )
        for left, right, low, high in zip(*x[1:], *y[1:], strict=True)
        if math.isfinite(right - left) and math.isfinite(high - low)
    ]
    # all turn the same way, so that what two of them cover is no darker
    hulls = []
    for one, other in pairwise(ellipses):
        points = np.concatenate([one, other])
        hulls.append(Outline(points[ConvexHull(points).vertices], closed=False))
    if hulls:
        whole = Outline.make_compound_path(*hulls)
        ax.add_patch(PathPatch(whole, color=colour, alpha=0.1, linewidth=0))


def curves(path: Path, runs: ByMethod, kid_scale: float) -> None:
    """Held-out loss, training loss, KID and recall over steps."""
    panels = (
        ("heldout", "held-out loss", 1.0), ("train", "training loss", 1.0),
        ("kid", "KID, % of the base's", kid_scale), ("recall", "recall, %", 100.0),
        ("copies", "near-copies, %", 100.0),
    )  # fmt: skip
    figure, axes = _page(18, 3.8, len(panels))
    colours = _colours(runs)
    for ax, (metric, title, scale) in zip(axes, panels, strict=True):
        for name, found in trained(runs).items():
            mean, low, high = _mean(found, metric, scale)
            if _shaded(runs):
                ax.fill_between(
                    found[0].steps, low, high, color=colours[name], alpha=0.12, linewidth=0
                )
            ax.plot(found[0].steps, mean, color=colours[name], linewidth=1.8,
                    label=METHODS[name].label)  # fmt: skip
        ax.set_title(title, loc="left", color=INK, fontsize=11)
        ax.set_xlabel("step", color=MUTED)
        if metric == "kid":
            ax.set_yscale("symlog", linthresh=2)
            _plain(ax.yaxis)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8,
        labelcolor=INK,
    )  # fmt: skip
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


def sheet_path(folder: Path, method: str, k: int, seed: int) -> Path:
    return folder / f"{method}-{k}-{seed}.png"


def grids(path: Path, folder: Path, runs: ByMethod) -> bool:
    """Of the first run of every method, if its samples were kept: training images, then samples at
    the step that folds chose and at the last. Whether there are any."""
    from PIL import Image

    rows: list[tuple[str, Any]] = []
    for name in METHODS:
        if not runs.get(name):
            continue
        run = runs[name][0]
        sheet = sheet_path(folder, name, run.k, run.seed)
        if not sheet.exists():
            continue
        image = np.asarray(Image.open(sheet))
        side = image.shape[1] // _SHOWN  # images are squares
        lines = [image[i : i + side] for i in range(0, len(image), side)]
        if not rows:
            rows.append(("training images", lines[0]))
        for what, step in (("stopped early", run.early), ("last step", run.steps[-1])):
            if name != BASELINE or what == "last step":
                label = f"{METHODS[name].label}, {what} ({step})"
                rows.append((label, lines[1 + run.steps.index(step)]))
    if not rows:
        return False
    figure, _ = _page(12, 0.46 * len(rows) + 0.2)
    figure.clf()
    for ax, (label, line) in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows, strict=True):
        ax.imshow(_spaced(line), cmap="Greys_r", vmin=0, vmax=255, interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, color=INK)
        for spine in ax.spines.values():
            spine.set_visible(False)
    figure.savefig(path, dpi=110, facecolor=PAPER, bbox_inches="tight")
    return True


def _spaced(line: Any) -> Any:
    """A row of square images with a white line between them."""
    side = len(line)
    tiles = np.split(line, range(side, line.shape[1], side), axis=1)
    gap = np.full((side, max(1, side // 8), *line.shape[2:]), 255, line.dtype)
    return np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)
