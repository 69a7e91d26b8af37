"""The picture of a ledger: bytes by level of the network, stacked by operator."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ..memory.account import Ledger, mib

INK, MUTED, PAPER, EDGE = "#1f2328", "#667078", "#fbfaf7", "#d8d5cd"
# an operator keeps its colour from picture to picture
COLOURS = {
    "attention": "#0b6e99",
    "adapter_linear": "#d1242f",
    "adapter": "#d1242f",
    "gelu": "#c4552d",
    "mul": "#e39b5b",
    "linear": "#7d5ba6",
    "layer_norm": "#6b7f3a",
    "group_norm": "#a3b86c",
    "conv": "#3f8f85",
    "silu": "#8fc1b5",
    "checkpoint": "#4a5a78",
}
SPARE = ("#b08d57", "#5f6b73", "#98709c", "#4d7ea8")
OTHERS = "#c9c5bb"
OTHER = "other layers"
LINE = 0.27  # inches
KINDS, LEVELS = 9, 16  # most operators and bars that are told apart


def levels(found: Ledger) -> dict[str, list[str]]:
    """Level -> the modules in it, in the order of the forward: `up_blocks.0`, or `blocks.0-3` where
    single blocks are too many; the layers around the blocks come last, as "other layers"."""
    modules = list(dict.fromkeys(entry.module for entry in found.entries))
    last: dict[str, int] = {}
    for name in modules:
        first, number = _block(name)
        last[first] = max(last.get(first, 0), number or 0)
    groups: dict[str, list[str]] = {}
    for together in itertools.count(1):
        groups = {}
        for name in modules:
            groups.setdefault(_level(name, together, last), []).append(name)
        if len(groups) <= LEVELS or together > len(modules):
            break
    if OTHER in groups:
        groups[OTHER] = groups.pop(OTHER)
    return groups


def _block(module: str) -> tuple[str, int | None]:
    """("up_blocks", 0) for "up_blocks.0.resnets.1"; None where no number follows."""
    first, _, rest = module.partition(".")
    number = rest.partition(".")[0]
    return first, int(number) if number.isdigit() else None


def _level(module: str, together: int, last: dict[str, int]) -> str:
    first, number = _block(module)
    if number is None:
        return first if first == "mid_block" else OTHER
    start = number // together * together
    end = min(start + together - 1, last[first])
    return f"{first}.{start}" + (f"-{end}" if end > start else "")


def draw(path: Path, found: Ledger, title: str, setup: str) -> None:
    """Writes the picture: one bar per level, one colour per operator, and the sums."""
    from matplotlib.figure import Figure

    groups = levels(found)
    kinds = list(found.by_operator())
    shown = kinds[:KINDS]
    spare = iter(SPARE * 3)
    colours = {kind: COLOURS.get(kind) or next(spare) for kind in shown}
    level_of = {name: label for label, names in groups.items() for name in names}
    sums = {label: dict.fromkeys([*shown, ""], 0) for label in groups}
    for entry in found.entries:
        kind = entry.operator if entry.operator in shown else ""
        sums[level_of[entry.module]][kind] += entry.bytes

    by_operator = found.by_operator()
    legend = [(kind, by_operator[kind]) for kind in shown]
    if len(kinds) > len(shown):
        legend.append(("others", found.total - sum(size for _, size in legend)))
    height = max(2.0 + 0.42 * len(groups), 2.35 + LINE * (len(legend) + 3))
    # long names push the bars to the right
    start = 0.04 + 0.0077 * max(map(len, groups), default=0)
    figure = Figure(figsize=(11, height), facecolor=PAPER)
    axes = figure.add_axes((start, 0.75 / height, 0.675 - start, 1 - 2.0 / height))
    for y, parts in enumerate(sums.values()):
        left = 0.0
        for kind, size in parts.items():
            axes.barh(y, size / 2**20, 0.72, left, color=colours.get(kind, OTHERS), linewidth=0)
            left += size / 2**20
        axes.text(left, y, f"  {mib(left * 2**20)}", va="center", fontsize=10.5, color=INK)
    widest = max((sum(p.values()) for p in sums.values()), default=0) / 2**20
    axes.set(xlim=(0, 1.17 * max(widest, 1e-6)), ylim=(len(sums) - 0.4, -0.6))
    axes.set_yticks(range(len(sums)), list(sums), fontsize=11, color=INK)
    axes.set_xlabel("MiB saved for backward", fontsize=10, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axes.tick_params(axis="y", labelsize=11, labelcolor=INK)
    axes.set_facecolor(PAPER)
    axes.grid(axis="x", color=EDGE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)

    def write(x: float, inches: float, words: str, **style: Any) -> None:
        style = {"color": INK, "fontsize": 11, "va": "center", "ha": "left", **style}
        figure.text(x, 1 - inches / height, words, **style)

    write(0.03, 0.38, f"Where {title} keeps its memory", fontsize=17, fontweight="bold")
    write(0.03, 0.76, setup, fontsize=11, color=MUTED)
    down = 1.30
    write(0.70, down, f"{mib(found.total)} saved for backward", fontsize=12, fontweight="bold")
    for kind, size in legend:
        down += LINE
        figure.text(0.70, 1 - down / height, "\N{BLACK SQUARE}", fontsize=14, va="center",
                    color=colours.get(kind, OTHERS))  # fmt: skip
        write(0.725, down, kind.replace("_", " "))
        write(0.91, down, mib(size), ha="right")
        write(0.975, down, f"{100 * size / max(found.total, 1):.1f} %", ha="right", color=MUTED)
    down += 0.46
    write(0.70, down, "beside it", fontsize=12, fontweight="bold")
    for name, size in (
        ("weights", found.parameters),
        ("gradients", found.trainable),
        ("AdamW", 2 * found.trainable),
    ):
        down += LINE
        write(0.725, down, name)
        write(0.91, down, mib(size), ha="right")
    figure.savefig(path, dpi=120, facecolor=PAPER)
