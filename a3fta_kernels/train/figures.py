"""The pictures of a run, drawn from its folder: curves, noise levels, copies, samples, pairs.

Each function gives a figure that reads at 700 pixels' width, or None where there is nothing to
draw. Colours are Okabe and Ito's and viridis, which the colour-blind tell apart; near-copies have a
thick frame besides the red.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .run_files import Curve, Row, Run, distance_of, is_copy, nearest_of, prompts, thumbnail
from .verdict import count

INK, MUTED, PAPER, EDGE, QUIET = "#1f2328", "#59636e", "#ffffff", "#d1d5da", "#b3bac2"
HELDOUT, TRAIN, COPY, RECALL = "#d55e00", "#0072b2", "#d55e00", "#009e73"
FRAME = "#cf222e"
WIDTH, DPI = 7.0, 200  # inches; twice the 100 at which its 9 points are 12.5 pixels
SMALL, NORMAL, TITLE = 8.5, 9.5, 11.0
ROWS, COLUMNS, PAIRS = 8, 6, 12  # most that a grid shows
LINE = 0.155  # inches that a line of small text takes


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, facecolor=PAPER)
    return stream.getvalue()


def curves(run: Run) -> Figure | None:
    """Loss over steps: training photos, held-out photos or folds, and the chosen step."""
    lines = [
        (run.heldout, HELDOUT, _heldout_name(run)),
        (run.mean_of("train_mean"), TRAIN, "training photos"),
    ]
    drawn = [(curve, colour, name) for curve, colour, name in lines if curve]
    noisy = _smooth([(row["step"], row["loss"]) for row in run.log if row.get("loss") is not None])
    if not drawn and not noisy:
        return None
    figure = Figure(figsize=(WIDTH, 3.8))
    ax = _panel(figure, 0.7, 0.85, 4.4, 2.4, run.span)
    ax.set_ylabel("loss (mean squared error)", fontsize=NORMAL, color=MUTED)
    labels = []
    values = [v for curve, _, _ in drawn for v in curve.values]
    for curve, colour, name in drawn:
        _line(ax, curve.steps, curve.values, colour)
        labels.append((curve.values[-1], name, colour))
    if len(run.folds) > 1 and run.mean_of("heldout_mean") is None and run.heldout:
        low, high = _band(run.folds, run.heldout.steps)
        ax.fill_between(run.heldout.steps, low, high, color=HELDOUT, alpha=0.15, linewidth=0)
        values += low + high
    if noisy:
        steps, losses = zip(*noisy, strict=True)
        ax.plot(steps, losses, color=QUIET, linewidth=1.0, zorder=1)
        labels.append((losses[-1], "training steps, smoothed\n(noise at random)", MUTED))
        # without its outliers: the evaluations are what matters
        ordered = sorted(losses)
        values += [ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20], losses[-1]]
    _limits(ax, values)
    _choice(ax, run, run.heldout)
    _label_ends(ax, labels)
    _title(
        figure, "Loss over training", "fixed noise at fixed levels, the same at every evaluation"
    )
    return figure


def noise_levels(run: Run) -> Figure | None:
    """Per range of noise levels: how the held-out loss changes, and its gap to training."""
    rows = run.binned
    if len(rows) < 2:  # nothing has changed yet
        return None
    bins, first = rows[0]["bins"], rows[0]["heldout"]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(WIDTH, 3.95))
    panels = (
        ("held-out loss, change since the start", lambda row, i: row["heldout"][i], first),
        (
            "gap, held-out minus training",
            lambda row, i: _minus(row["heldout"][i], (row.get("train") or [None] * len(bins))[i]),
            [0.0] * len(bins),
        ),
    )
    for place, (name, value, origin) in enumerate(panels):
        ax = _panel(figure, 0.7 + 2.85 * place, 1.1, 2.2, 2.3, run.span)
        ax.set_title(name, fontsize=NORMAL, color=INK, loc="left")
        ax.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
        ends, seen = [], [0.0]
        for i, (low, high) in enumerate(bins):
            colour = colormaps["viridis"](0.82 * i / max(len(bins) - 1, 1))
            ys = [_share(value(row, i), origin[i], first[i]) for row in rows]
            _line(ax, steps, ys, colour)
            seen += [y for y in ys if not math.isnan(y)]
            ends.append((ys[-1], f"{low:.2g} to {high:.2g}", colour))
        _limits(ax, seen)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
        if run.chosen is not None:
            ax.axvline(run.chosen, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        if place == 1:
            _label_ends(ax, ends)
            ax.text(1.03, 1.06, "noise level", transform=ax.transAxes, fontsize=SMALL, color=MUTED,
                    va="bottom")  # fmt: skip
    dashes = "" if run.chosen is None else f"; dashes: step {run.chosen:,}, chosen"
    _title(figure, "At which noise level it overfits", "noise level: 0 is the photo, 1 is pure "
           f"noise\n%: of that level's held-out loss at the start{dashes}")  # fmt: skip
    return figure


def copies(run: Run) -> Figure | None:
    """Share of near-copies among samples, and of training photos within their reach."""
    lines = []
    for key, name, colour in (
        ("copies", "samples that are\nnear-copies", COPY),
        ("recall", "training photos within\nreach of the samples", RECALL),
    ):
        rows = [row for row in run.samples if row.get(key) is not None]
        if rows:
            lines.append(([r["step"] for r in rows], [r[key] for r in rows], name, colour))
    if not lines:
        return None
    figure = Figure(figsize=(WIDTH, 3.1))
    ax = _panel(figure, 0.7, 0.85, 4.4, 1.7, run.last_step)
    for steps, values, _, colour in lines:
        _line(ax, steps, values, colour)
    ax.set_ylim(-0.04, 1.04)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    _choice(ax, run, None)
    _label_ends(ax, [(values[-1], name, colour) for _, values, name, colour in lines])
    sizes = {len(row["files"]) for row in run.samples}
    each = "not equally many samples each time"
    if len(sizes) == 1:
        each = f"{count(sizes.pop(), 'sample')} each time"
    _title(figure, "Near-copies and recall", each)
    return figure


def sample_grid(run: Run) -> Figure | None:
    """Samples over steps: a row per step, a column per prompt."""
    if not run.samples:
        return None
    rows = _some(run.samples, ROWS, keep=run.sample_row())
    most = max(len(row["files"]) for row in rows)
    columns = min(most, COLUMNS)
    left, gap = 0.75, 0.06
    side = min((WIDTH - left - 0.1) / columns - gap, 1.6)
    heads = [_wrapped(text, side, 4) for text in _heads(rows, columns)]
    text_height = LINE * max(head.count("\n") + 1 if head else 0 for head in heads)
    top = 0.66 + text_height
    figure = Figure(figsize=(WIDTH, top + len(rows) * (side + gap) + 0.08))
    for c, head in enumerate(heads):
        _text(figure, left + c * (side + gap), top - 0.05, head, va="bottom", fontsize=SMALL,
              color=MUTED)  # fmt: skip
    for r, row in enumerate(rows):
        y = top + r * (side + gap)
        mark = row["step"] == run.chosen
        _text(figure, left - 0.1, y + side / 2, f"{row['step']:,}" + ("\nchosen" if mark else ""),
              ha="right", va="center", fontweight="bold" if mark else "normal")  # fmt: skip
        for c in range(min(columns, len(row["files"]))):
            _tile(figure, left + c * (side + gap), y, side, run.folder / row["files"][c],
                  is_copy(row, c))  # fmt: skip
    shown = [f"the first {columns} of {most}"] if most > columns else []
    if len(rows) < len(run.samples):
        shown.append(f"{len(rows)} of {len(run.samples)} times")
    if any(is_copy(row, i) for row in rows for i in range(min(columns, len(row["files"])))):
        shown.append("red frame: a near-copy of a training photo")
    _title(figure, "Samples by step", "; ".join(shown))
    return figure


def nearest_pairs(run: Run) -> Figure | None:
    """Samples of the chosen step, each beside its nearest training photo, the closest first."""
    row = run.sample_row()
    if row is None or not row.get("nearest"):
        return None
    order = sorted(range(len(row["nearest"])), key=lambda i: distance_of(row, i) or 0.0)
    order = [i for i in order if i < len(row["files"])]
    shown = order[:PAIRS]
    across, gap, between = 3, 0.04, 0.25
    side = (WIDTH - 0.2 - (across - 1) * between - across * gap) / (2 * across)
    step_y = side + 0.4
    figure = Figure(figsize=(WIDTH, 0.85 + step_y * math.ceil(len(shown) / across)))
    for place, i in enumerate(shown):
        x = 0.1 + (place % across) * (2 * side + gap + between)
        y = 0.85 + (place // across) * step_y
        name = nearest_of(row, i) or ""
        _tile(figure, x, y, side, run.folder / row["files"][i], is_copy(row, i), "sample")
        file = (run.photo(name) or {}).get("file")
        _tile(figure, x + side + gap, y, side, Path(file) if file else None, False, "photo")
        distance = distance_of(row, i)
        words = "" if distance is None else f"{distance:.2f}"
        words += " near-copy" if is_copy(row, i) else ""
        _text(figure, x, y + side + 0.05, words, fontsize=SMALL)
        _text(figure, x + side + gap, y + side + 0.05, _short(Path(name).stem, side),
              fontsize=SMALL, color=MUTED)  # fmt: skip
    before = run.chosen is not None and row["step"] < run.chosen
    aside = f"step {row['step']:,}" + (f", the last before step {run.chosen:,}" if before else "")
    if row.get("threshold") is not None:
        aside += f"; near-copies, in red, are closer than {row['threshold']:.2f}"
    aside += "\ndistance: 0 is the same picture, 1 as far as a typical photo"
    more = f" (the closest {len(shown)} of {len(order)})" if len(order) > len(shown) else ""
    _title(figure, f"Samples, each beside its nearest training photo{more}", aside)
    return figure


def _heldout_name(run: Run) -> str:
    if run.mean_of("heldout_mean") is None and run.folds:
        folds = len(run.folds)
        return f"held-out photos,\nmean of {folds} folds" + ("\n(band: all folds)" * (folds > 1))
    return "held-out photos"


def _band(folds: Sequence[Curve], steps: Sequence[int]) -> tuple[list[float], list[float]]:
    tables = [dict(zip(curve.steps, curve.values, strict=True)) for curve in folds]
    columns = [[table[step] for table in tables] for step in steps]
    return [min(column) for column in columns], [max(column) for column in columns]


def _smooth(points: list[tuple[int, float]], most: int = 400) -> list[tuple[float, float]]:
    """Running means, over a tenth of the points, at up to `most` places."""
    width = max(len(points) // 10, 1)
    sums = [0.0]
    for _, loss in points:
        sums.append(sums[-1] + loss)
    every = max(len(points) // most, 1)
    ends = [i for i in range(1, len(points) + 1) if (len(points) - i) % every == 0]
    starts = [max(i - width, 0) for i in ends]
    spans = zip(starts, ends, strict=True)
    return [(points[end - 1][0], (sums[end] - sums[start]) / (end - start)) for start, end in spans]


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _share(value: float | None, origin: float | None, unit: float | None) -> float:
    return math.nan if value is None or origin is None or not unit else (value - origin) / unit


def _panel(
    figure: Figure, left: float, top: float, width: float, height: float, last_step: int
) -> Any:
    """Axes over steps; inches from the top left."""
    total = figure.get_figheight()
    ax = figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))
    ax.set_xlabel("step", fontsize=NORMAL, color=MUTED)
    ax.tick_params(labelcolor=MUTED, labelsize=SMALL, length=3, color=EDGE)
    room = 0.02 * max(last_step, 1)
    ax.set_xlim(-room, max(last_step, 1) + room)
    ax.xaxis.set_major_locator(MaxNLocator(4 if width < 3 else 6, integer=True))
    ax.xaxis.set_major_formatter(lambda x, _: f"{int(x):,}")
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", color=EDGE, linewidth=0.6)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(EDGE)
    return ax


def _line(ax: Any, steps: Sequence[int], values: Sequence[float], colour: Any) -> None:
    marker = "o" if len(steps) <= 12 else ""
    ax.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3.5)


def _limits(ax: Any, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    ax.set_ylim(low - room, high + 1.5 * room)


def _choice(ax: Any, run: Run, curve: Curve | None) -> None:
    """A dashed line at the chosen step, with its name above the panel."""
    if run.chosen is None:
        return
    ax.axvline(run.chosen, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1.5)
    value = curve.at(run.judged) if curve and run.judged is not None else None
    if value is not None:
        ax.plot([run.judged], [value], "o", color=HELDOUT, markersize=8, markeredgecolor=PAPER,
                markeredgewidth=1.5, zorder=4)  # fmt: skip
    left, right = ax.get_xlim()
    place = (run.chosen - left) / (right - left)
    side = "left" if place < 0.15 else "right" if place > 0.85 else "center"
    said = f"chosen: step {run.chosen:,}"
    if run.judged != run.chosen:
        said += f", by the folds' step {run.judged:,}"
    ax.text(run.chosen, 1.02, said, transform=ax.get_xaxis_transform(),
            ha=side, va="bottom", fontsize=SMALL, color=INK)  # fmt: skip


def _label_ends(ax: Any, labels: Sequence[tuple[float, str, Any]]) -> None:
    """Names at the right ends of lines, in their colours, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    height = ax.get_position().height * ax.figure.get_figheight()
    found = [
        (min(max((value - low) / (high - low), 0.0), 1.0), name, colour)
        for value, name, colour in reversed(labels)  # the first stays on top of its equals
        if not math.isnan(value)
    ]
    found.sort(key=lambda label: round(label[0], 2))
    sizes = [LINE * (name.count("\n") + 1) / height for _, name, _ in found]
    places = spread([place for place, _, _ in found], sizes)
    for (_, name, colour), place in zip(found, places, strict=True):
        ax.text(1.03, place, name, transform=ax.transAxes, fontsize=SMALL, color=colour,
                va="center", linespacing=1.1)  # fmt: skip


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Middles of labels near the wanted ones (ascending), so that none overlaps the next.

    What would be pushed beyond 1 moves down with its neighbours; where all cannot fit, they run on
    below 0.
    """
    places = list(wanted)
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(sizes)]
    for i, gap in enumerate(gaps):
        places[i + 1] = max(places[i + 1], places[i] + gap)
    if places:
        places[-1] = min(places[-1], 1.0)
    for i in reversed(range(len(gaps))):
        places[i] = min(places[i], places[i + 1] - gaps[i])
    return places


def _title(figure: Figure, title: str, aside: str) -> None:
    _text(figure, 0.1, 0.08, title, fontsize=TITLE, fontweight="bold")
    _text(figure, 0.1, 0.31, aside, fontsize=SMALL, color=MUTED)


def _text(figure: Figure, x: float, y: float, words: str, **style: Any) -> None:
    """Places are in inches from the top left. A $ is a dollar, not mathematics."""
    style = {"color": INK, "fontsize": NORMAL, "va": "top", "ha": "left", **style}
    height = figure.get_figheight()
    figure.text(x / WIDTH, 1 - y / height, words, parse_math=False, linespacing=1.15, **style)


def _tile(
    figure: Figure, x: float, y: float, side: float, path: Path | None, red: bool, what: str = ""
) -> None:
    height = figure.get_figheight()
    ax = figure.add_axes((x / WIDTH, 1 - (y + side) / height, side / WIDTH, side / height))
    image = thumbnail(path, round(side * DPI))
    if image is None:
        ax.text(0.5, 0.5, f"{what or 'image'}\nnot found", ha="center", va="center", color=MUTED,
                fontsize=SMALL)  # fmt: skip
    else:
        ax.imshow(image)  # keeps its aspect ratio, in the middle of the tile
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=FRAME if red else EDGE, linewidth=3.0 if red else 0.6)


def _some(rows: list[Row], most: int, keep: Row | None) -> list[Row]:
    """Up to `most` of them, evenly, with the first, the last and `keep`."""
    if len(rows) <= most:
        return rows
    picked = {round(i * (len(rows) - 1) / (most - 1)) for i in range(most)}
    if keep is not None:
        wanted = rows.index(keep)
        if wanted not in picked:
            picked.remove(min(picked - {0, len(rows) - 1}, key=lambda i: abs(i - wanted)))
            picked.add(wanted)
    return [rows[i] for i in sorted(picked)]


def _heads(rows: list[Row], columns: int) -> list[str]:
    """The prompts above the columns, of the last row, whose prompts are today's."""
    return (prompts(rows[-1]) + [""] * columns)[:columns]


def _wrapped(text: str, inches: float, lines: int) -> str:
    """As many letters as fit, cut with an ellipsis after `lines` lines."""
    width = max(int(inches / 0.068), 6)
    return textwrap.fill(text, width, max_lines=lines, placeholder=" …")


def _short(name: str, inches: float) -> str:
    """A file's name from both ends: its number is often last."""
    most = max(int(inches / 0.072), 6)
    if len(name) <= most:
        return name
    half = (most - 1) // 2
    return f"{name[: most - 1 - half]}…{name[-half:]}"
