"""The pictures of REPORT.md. The same results give the same bytes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter
from matplotlib.transforms import Bbox

OURS, LORA, LEAN_LORA = "#1f5fa8", "#cc6a1f", "#8a55a8"
GREY, LIGHT, INK = "#5f6368", "#b9bdc2", "#202124"
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": LIGHT, "axes.labelcolor": GREY,
    "xtick.color": GREY, "ytick.color": GREY, "axes.axisbelow": True, "grid.color": "#e8eaed",
    "figure.dpi": 120, "savefig.dpi": 120,
}  # fmt: skip


class Point(NamedTuple):
    label: str
    x: float
    y: float
    kind: str  # of COLOURS
    front: bool


COLOURS = {
    "A3FTA": OURS, "PEFT LoRA": LORA, "PEFT LoRA, lean trunk": LEAN_LORA, "full fine-tuning": GREY
}  # fmt: skip
# lines pass behind a text without touching it
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def scatter(path: Path, title: str, source: str, points: Sequence[Point], floor: float | None):
    """Time against memory, both over PEFT LoRA's; returns the boxes of the labels."""
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8.4, 5.4))
        figure.subplots_adjust(left=0.085, right=0.975, top=0.85, bottom=0.155)
        ax.grid(True)
        ax.set_yscale("log")
        for p in points:
            ax.plot(
                p.x, p.y, "o", ms=8 if p.front else 6, color=COLOURS[p.kind], zorder=4,
                mec="white", mew=0.8,
            )  # fmt: skip
        xs, ys = [p.x for p in points], [p.y for p in points]
        low = min([*xs, floor] if floor else xs)
        span = max(xs) - low or 1.0
        ax.set_xlim(low - 0.09 * span, max(xs) + 0.16 * span)
        ax.set_ylim(min(ys) / 1.25, max(ys) * 1.3)
        staircase(ax, [p for p in points if p.front])
        ax.axvline(1, color=LORA, lw=0.8, alpha=0.5, zorder=1)
        ax.axhline(1, color=LORA, lw=0.8, alpha=0.5, zorder=1)
        if floor is not None:
            ax.axvline(floor, color=GREY, lw=1, ls=(0, (4, 3)), zorder=1)
            ax.text(
                floor, 1.005, "the frozen trunk alone", transform=ax.get_xaxis_transform(),
                color=GREY, fontsize=8, ha="center", va="bottom",
            )  # fmt: skip
        ax.set_xlabel("time of a step, over PEFT LoRA's  (left is faster)")
        ax.set_ylabel("peak above the weights, over PEFT LoRA's  (down is less)")
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_yticks([y for y in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
                       if min(ys) / 1.25 <= y <= max(ys) * 1.3])  # fmt: skip
        heading(figure, title, source)
        legend(figure, {p.kind for p in points})
        boxes = place(ax, points)
        save(figure, path)
    return boxes


def heading(figure: Any, title: str, source: str) -> None:
    figure.text(0.02, 0.975, title, fontsize=12.5, fontweight="bold", va="top", color=INK)
    lines = textwrap.fill(source, 150)
    figure.text(0.02, 0.925, lines, fontsize=7.8, va="top", color=GREY)


def legend(figure: Any, kinds: set[str]) -> None:
    x, renderer = 0.02, figure.canvas.get_renderer()
    entries = [(f"● {kind}", colour) for kind, colour in COLOURS.items() if kind in kinds]
    for said, colour in (*entries, ("large, joined: nothing is both faster and smaller", GREY)):
        text = figure.text(x, 0.02, said, color=colour, fontsize=8.5)
        x += text.get_window_extent(renderer).width / figure.bbox.width + 0.025


def staircase(ax: Axes, front: list[Point]) -> None:
    """Joins the points that nothing dominates."""
    ranked = sorted(front, key=lambda p: (p.x, -p.y))
    right, top = ax.get_xlim()[1], ax.get_ylim()[1]
    xs = [ranked[0].x, *(p.x for p in ranked), right]
    ys = [top, *(p.y for p in ranked), ranked[-1].y]
    ax.step(xs, ys, where="post", color=OURS, lw=1.4, alpha=0.35, zorder=2)


# around a point, near ones first: offsets in points, and how the text is aligned
_PLACES = [
    (dx * d, dy * d, "left" if dx > 0 else "right" if dx < 0 else "center")
    for d in (9, 16, 25, 36, 50, 66, 84, 104)
    for dx, dy in ((1, 0), (0.8, 0.8), (0.8, -0.8), (0, 1.1), (0, -1.1), (-1, 0), (-0.8, 0.8),
                   (-0.8, -0.8))
]  # fmt: skip


def place(ax: Axes, points: Sequence[Point]) -> list[Bbox]:
    """Labels each point where no other label or point is; far ones get a line to their point."""
    figure = ax.figure
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    scale = figure.dpi / 72
    centres = ax.transData.transform([(p.x, p.y) for p in points])
    dots = [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale)
            for x, y in centres]  # fmt: skip
    inside = ax.get_window_extent(renderer)
    taken: list[Bbox] = []
    # the front first: its labels are read first
    order = sorted(range(len(points)), key=lambda i: (not points[i].front, points[i].x))
    for i in order:
        p = points[i]
        best: tuple[float, Any, Bbox, float] | None = None
        for dx, dy, align in _PLACES:
            text = ax.annotate(
                p.label, (p.x, p.y), (dx, dy), textcoords="offset points", ha=align, va="center",
                fontsize=8, color=COLOURS[p.kind], fontweight="bold" if p.front else "normal",
                zorder=5, path_effects=HALO,
            )  # fmt: skip
            box = text.get_window_extent(renderer).expanded(1.02, 1.1)
            others = [d for j, d in enumerate(dots) if j != i]
            cost = sum(overlap(box, other) for other in (*taken, *others)) + outside(box, inside)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = cost, text, box, (dx * dx + dy * dy) ** 0.5
            else:
                text.remove()
            if not best[0]:
                break
        assert best is not None
        taken.append(best[2])
        if best[3] > 20:
            x, y = best[1].get_position()
            ax.annotate(
                "", (p.x, p.y), (x, y), textcoords="offset points", zorder=3,
                arrowprops={"arrowstyle": "-", "color": LIGHT, "lw": 0.8, "shrinkB": 4},
            )  # fmt: skip
    return taken


def overlap(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def outside(a: Bbox, frame: Bbox) -> float:
    return a.width * a.height - overlap(a, frame)


Bar = tuple[str, float, str, str]  # label, length, colour, what stands behind it


def bars(
    path: Path, title: str, source: str, panels: Iterable[tuple[str, list[Bar]]], label: str,
    line: float | None = None,
) -> None:  # fmt: skip
    """Horizontal bars, one panel below the other; `line` is where a rival stands."""
    panels = list(panels)
    counts = [len(found) for _, found in panels]
    told = textwrap.fill(source, 150)
    top = 0.85 + 0.14 * told.count("\n")
    inches = 0.4 + top + sum(0.27 * n + 0.42 for n in counts)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(panels), 1, figsize=(8.4, inches), sharex=line is not None, squeeze=False,
            gridspec_kw={"height_ratios": [n + 0.6 for n in counts], "hspace": 4.6 / sum(counts)},
        )  # fmt: skip
        longest_label = max(len(b[0]) for _, found in panels for b in found)
        figure.subplots_adjust(
            left=max(0.34, 0.03 + 0.0079 * longest_label), right=0.93, top=1 - top / inches,
            bottom=0.5 / inches,
        )  # fmt: skip
        for ax, (name, found) in zip(axes[:, 0], panels, strict=True):
            longest = max(length for _, length, _, _ in found)
            for i, (_, length, colour, said) in enumerate(found):
                ax.barh(i, length, 0.72, color=colour)
                ax.text(length, i, f" {said}", va="center", fontsize=8, color=INK,
                        path_effects=HALO, zorder=5)  # fmt: skip
            ax.set_yticks(range(len(found)), [b[0] for b in found])
            ax.tick_params(axis="y", length=0, labelcolor=INK)
            ax.invert_yaxis()
            ax.set_title(name, loc="left", fontsize=9.5, fontweight="bold", color=INK)
            ax.grid(True, axis="x")
            ax.margins(x=0.02)
            if line is not None:
                ax.axvline(line, color=GREY, lw=1, ls=(0, (4, 3)))
            else:
                ax.set_xlim(0, 1.16 * longest)
        if line is not None:
            most = max(b[1] for _, found in panels for b in found)
            axes[0, 0].set_xlim(0, 1.16 * max(most, line))
            axes[0, 0].xaxis.set_major_locator(MultipleLocator(0.25 if most < 3 else 1))
        axes[-1, 0].set_xlabel(label)
        figure.text(0.02, 1 - 0.1 / inches, title, fontsize=12.5, fontweight="bold", va="top",
                    color=INK)  # fmt: skip
        figure.text(0.02, 1 - 0.38 / inches, told, fontsize=7.8, va="top", color=GREY)
        save(figure, path)
