"""Level auto: for each block the level that fits a budget of kept bytes and costs the least.

Every level is measured once for the whole model by the ledger, which gives the bytes of each unit
(a transformer block, a residual block, the rest) at each level. The time that a level adds to a
unit is a stated model:

    seconds = products computed again / PRODUCTS + bytes of 8-bit copies moved / BANDWIDTH

Starting from exact, the step that saves the most bytes per second is taken until the ledger of the
whole fits; then steps that turned out not to be needed are taken back, the dearest first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..memory.account import Ledger, mib
from .rules import rule_for
from .swapping import Settings

# of a large GPU; only their ratio decides: FLOP and bytes in a second
PRODUCTS, BANDWIDTH = 400e12, 3e12
# a copy is made by a read and a write, and read back by a read, a write and the reader's read
_PASSES = 5

Choose = Callable[[str], Settings]
Measure = Callable[[Choose], tuple[Any, Ledger]]


@dataclass(frozen=True)
class Step:
    """From one setting of a unit to the next that keeps less."""

    unit: str
    settings: Settings
    saves: int  # bytes
    costs: float  # seconds

    @property
    def price(self) -> float:
        return self.costs / self.saves


def fit(root: nn.Module, norms: str, limit: int, measure: Measure) -> tuple[Any, Ledger]:
    """What `measure` gave for the cheapest settings that keep at most `limit` bytes.

    measure(choose) makes the model lean by `choose(module name)` and returns its plan and ledger.
    Raises ValueError where no settings fit.
    """
    units = _units(root)
    rows = _Rows(root, units)
    options = [Settings(level, n) for n in _norms(norms) for level in _LEVELS]
    kept: dict[Settings, dict[str, int]] = {}
    with rows:
        for settings in options:
            _, found = measure(_choice([], units, settings))
            kept[settings] = _by_unit(found, units)
    steps = sorted(
        (step for unit in ("", *units) for step in _steps(root, unit, kept, rows.of.get(unit, 0))),
        key=lambda step: step.price,
    )
    total = sum(kept[options[0]].values())
    count, error = 0, 0  # steps taken; what the ledger of the mixture adds to the sum of units
    while True:
        while count < len(steps) and total + error > limit:
            total -= steps[count].saves
            count += 1
        taken = _give_back(steps[:count], limit - total - error)
        plan, found = measure(_choice(taken, units, options[0]))
        if found.total <= limit:
            return plan, found
        if count == len(steps):
            raise ValueError(
                f"budget: expected at least {mib(found.total)} ({found.total} bytes), the least "
                f"that norms={norms!r} allows, got {mib(limit)}"
            )
        error = max(error + 1, found.total - total)


_LEVELS = ("exact", "recompute", "block")


def _norms(norms: str) -> tuple[str, ...]:
    return ("input",) if norms == "input" else ("input", "int8")


def _units(root: nn.Module) -> list[str]:
    """Names of transformer blocks and residual blocks, outermost first."""
    found: list[str] = []
    for name, module in root.named_modules():
        rule = rule_for(module)
        whole = rule is not None and (rule.is_block or rule.is_residual)
        if whole and not any(name.startswith(f"{unit}.") for unit in found):
            found.append(name)
    return found


def _unit_of(name: str, units: list[str]) -> str:
    return next((u for u in units if name == u or name.startswith(f"{u}.")), "")


def _by_unit(found: Ledger, units: list[str]) -> dict[str, int]:
    sums = dict.fromkeys(("", *units), 0)
    for module, size in found.by_module().items():
        sums[_unit_of(module, units)] += size
    return sums


def _steps(
    root: nn.Module, unit: str, kept: dict[Settings, dict[str, int]], rows: int
) -> list[Step]:
    """The steps of a unit, cheapest first, each of which pays more for a byte than the last."""
    times = {s: _seconds(root, unit, s, rows, kept) for s in kept}
    found: list[Step] = []
    at = next(iter(kept))
    while True:
        better = [
            Step(unit, s, kept[at][unit] - kept[s][unit], max(times[s] - times[at], 0.0))
            for s in kept
            if kept[s][unit] < kept[at][unit]
        ]
        if not better:
            return found
        found.append(min(better, key=lambda step: (step.price, -step.saves)))
        at = found[-1].settings


def _seconds(
    root: nn.Module, unit: str, settings: Settings, rows: int, kept: dict[Settings, dict[str, int]]
) -> float:
    """What the settings add to the time of a step."""
    moved = 0
    if settings.norms == "int8":
        plain = kept[Settings(settings.level, "input")][unit]
        moved = _PASSES * (plain - kept[settings][unit])
    return 2 * rows * _again(root, unit, settings.level) / PRODUCTS + moved / BANDWIDTH


def _again(root: nn.Module, unit: str, level: str) -> int:
    """Elements of the weights that a block multiplies its stream with a second time."""
    if level == "exact" or not unit:
        return 0
    block = root.get_submodule(unit)
    total = 0
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear) or "norm" in name:
            continue
        narrowing = "to_out" in name or "to_add_out" in name or name.endswith(".w2")
        last = name.endswith("proj_out") or ".net.2" in name
        if not last and (level == "block" or not narrowing):
            total += module.weight.numel()
    return total


def _give_back(taken: list[Step], room: int) -> list[Step]:
    """The steps without those that fit into `room`, the dearest first; a unit's last step only."""
    kept = list(taken)
    for step in sorted(taken, key=lambda step: -step.costs):
        latest = next(s for s in reversed(kept) if s.unit == step.unit)
        if latest is step and step.costs > 0 and step.saves <= room:
            kept.remove(step)
            room -= step.saves
    return kept


def _choice(taken: list[Step], units: list[str], otherwise: Settings) -> Choose:
    chosen = {step.unit: step.settings for step in taken}  # the last step of a unit stands
    return lambda name: chosen.get(_unit_of(name, units), otherwise)


class _Rows:
    """Inside the context, notes how many rows the stream of each unit has in a forward."""

    def __init__(self, root: nn.Module, units: list[str]) -> None:
        self.modules = {unit: root.get_submodule(unit) for unit in units}
        self.of: dict[str, int] = {}

    def __enter__(self) -> _Rows:
        self.handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, unit=unit: self._note(unit, args, kwargs), with_kwargs=True
            )
            for unit, module in self.modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note(self, unit: str, args: tuple, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states")
        self.of[unit] = x.numel() // x.shape[-1] if x is not None and x.dim() == 3 else 0
