"""The picture of a ledger: bytes by level of the network, stacked by operator."""

from __future__ import annotations

from pathlib import Path

from ..memory.account import Ledger, mib
from ..memory.places import ROOT

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
KINDS, LEVELS = 9, 16  # most operators and bars that are told apart


def levels(found: Ledger, modules: list[str]) -> dict[str, list[str]]:
    """Level -> the modules in it, in the model's order: `up_blocks.0`, or `blocks.*` where there
    are too many; the few layers before and after the blocks are "other layers"."""
    order = {name: i for i, name in enumerate(modules)}
    whole = sorted({e.module for e in found.entries}, key=lambda name: order.get(name, -1))
    for wide in (False, True):
        groups: dict[str, list[str]] = {}
        for name in whole:
            parts = name.split(".")
            numbered = len(parts) > 1 and parts[1].isdigit()
            if numbered:
                label = f"{parts[0]}.*" if wide else ".".join(parts[:2])
            else:
                label = parts[0] if parts[0] == "mid_block" else "other layers"
            groups.setdefault(label, []).append(name)
        if len(groups) <= LEVELS:
            break
    if "other layers" in groups:
        groups["other layers"] = groups.pop("other layers")
    return groups


def draw(path: Path, found: Ledger, title: str, setup: str, modules: list[str]) -> None:
    """Writes the picture; `modules` are the model's paths in order."""
    from matplotlib.figure import Figure

    groups = levels(found, modules)
    kinds = list(found.by_operator())
    shown = kinds[:KINDS]
    spare = iter(SPARE * 3)
    colours = {kind: COLOURS.get(kind) or next(spare) for kind in shown}
    level_of = {name: label for label, names in groups.items() for name in names}
    sums = {label: dict.fromkeys([*shown, ""], 0) for label in groups}
    for entry in found.entries:
        kind = entry.operator if entry.operator in shown else ""
        sums[level_of[entry.module]][kind] += entry.bytes

    height = 2.0 + 0.42 * max(len(groups), 6)
    figure = Figure(figsize=(11, height), facecolor=PAPER)
    axes = figure.add_axes((0.17, 0.75 / height, 0.53, 1 - 2.0 / height))
    for y, parts in enumerate(sums.values()):
        left = 0.0
        for kind, size in parts.items():
            axes.barh(y, size / 2**20, 0.72, left, color=colours.get(kind, OTHERS), linewidth=0)
            left += size / 2**20
        axes.text(left, y, f"  {mib(left * 2**20)}", va="center", fontsize=10.5, color=INK)
    widest = max((sum(p.values()) for p in sums.values()), default=0) / 2**20
    axes.set(xlim=(0, 1.17 * max(widest, 1e-6)), ylim=(len(sums) - 0.4, -0.6))
    names = [("model" if label == ROOT else label) for label in sums]
    axes.set_yticks(range(len(sums)), names, fontsize=11, color=INK)
    axes.set_xlabel("MiB saved for backward", fontsize=10, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9.5, length=0)
    axes.tick_params(axis="y", labelsize=11, labelcolor=INK)
    axes.set_facecolor(PAPER)
    axes.grid(axis="x", color=EDGE, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)

    def write(x: float, inches: float, words: str, **style: object) -> None:
        style = {"color": INK, "fontsize": 11, "va": "center", "ha": "left", **style}
        figure.text(x, 1 - inches / height, words, **style)

    write(0.03, 0.38, f"Where {title} keeps its memory", fontsize=17, fontweight="bold")
    write(0.03, 0.76, setup, fontsize=11, color=MUTED)
    legend = [(kind, found.by_operator()[kind]) for kind in shown]
    rest = found.total - sum(size for _, size in legend)
    legend += [("others", rest)] if rest else []
    y = 1.30
    write(0.735, y, f"{mib(found.total)} saved for backward", fontsize=12, fontweight="bold")
    for kind, size in legend:
        y += 0.27
        figure.text(0.735, 1 - y / height, "\N{BLACK SQUARE}", fontsize=14, va="center",
                    color=colours.get(kind, OTHERS))  # fmt: skip
        write(0.757, y, kind.replace("_", " "))
        write(0.975, y, f"{mib(size)}   {100 * size / max(found.total, 1):4.1f} %", ha="right")
    y += 0.46
    write(0.735, y, "beside it", fontsize=12, fontweight="bold")
    for name, size in (
        ("weights", found.parameters),
        ("gradients", found.trainable),
        ("AdamW", 2 * found.trainable),
    ):
        y += 0.27
        write(0.757, y, name)
        write(0.975, y, mib(size), ha="right", color=MUTED)
    figure.savefig(path, dpi=120, facecolor=PAPER)
