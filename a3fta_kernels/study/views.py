"""The lines of a results file as runs, and the steps at which runs are compared.

last: the end of the equal budget. early: where folds inside the k images say to stop. passes:
after as many passes over the k images as the folds made over their part of them. oracle: the
lowest loss of the large held-out set, which nobody has. converged: the first checkpoint after
which the training loss falls by less than `FLAT` until the end. matched: where the training loss
is closest to the highest of the lowest training losses of the methods of that k and seed, so that
all methods have learned as much of their images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .table import Line, numbers

VIEWS = ("last", "early", "passes", "oracle", "converged", "matched")
FLAT = 0.02

# cells of a line that are not lists
_SINGLE = {
    "plan", "pair", "method", "k", "seed", "parameters", "peak_bytes", "saved_bytes", "early",
    "rate", "step_ms", "seconds", "steps",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """curves: a value per checkpoint in `steps`, by the column's name. longer: steps of a pass over
    the k images, per step of one over what a fold trains on."""

    method: str
    k: int
    seed: int
    early: int
    parameters: int
    peak_bytes: int
    saved_bytes: int
    rate: float
    step_ms: float
    steps: tuple[int, ...]
    curves: dict[str, list[float]]
    longer: float

    @property
    def gap(self) -> list[float]:
        """Held-out loss over training loss, per checkpoint."""
        pairs = zip(self.curves["heldout"], self.curves["train"], strict=True)
        return [heldout - train for heldout, train in pairs]

    def at(self, metric: str, step: int) -> float:
        values = self.gap if metric == "gap" else self.curves[metric]
        return values[self.steps.index(step)]


def parse(line: Line, folds: int) -> Run:
    """folds: of the plan."""
    return Run(
        method=line["method"],
        k=int(line["k"]),
        seed=int(line["seed"]),
        early=int(line["early"]),
        parameters=int(line["parameters"]),
        peak_bytes=int(line["peak_bytes"]),
        saved_bytes=int(line["saved_bytes"]),
        rate=float(line["rate"]),
        step_ms=float(line["step_ms"]),
        steps=tuple(int(step) for step in line["steps"].split()),
        curves={name: numbers(cell) for name, cell in line.items() if name not in _SINGLE},
        longer=folds / (folds - 1),
    )


def matched_loss(runs: Sequence[Run]) -> float:
    """The training loss that every one of these methods reaches."""
    lowest = [min(run.curves["train"], key=_order) for run in runs if len(run.steps) > 1]
    return max((x for x in lowest if math.isfinite(x)), default=math.nan)


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def step_of(run: Run, view: str, level: float = math.nan) -> int:
    """The step of a view; `level`: what `matched_loss` said of the methods to compare."""
    train = run.curves["train"]
    if view == "early":
        return run.early
    if view == "passes":
        return _nearest(run.steps, run.longer * run.early)
    if view == "oracle":
        return run.steps[_least(run.curves["heldout"])]
    if view == "converged":
        flat = (i for i, loss in enumerate(train) if loss - min(train[i:]) < FLAT * loss)
        return run.steps[next(flat, len(train) - 1)]
    if view == "matched":
        return run.steps[_least([abs(loss - level) for loss in train])]
    if view != "last":
        raise ValueError(f"view: expected one of {', '.join(VIEWS)}, got {view!r}")
    return run.steps[-1]


def _nearest(steps: Sequence[int], wanted: float) -> int:
    """In proportion, as checkpoints lie; the earlier of two. The base has step 0 alone."""
    return min(steps, key=lambda step: abs(math.log(max(step, 1) / max(wanted, 1))))


def _least(values: Sequence[float]) -> int:
    return min(range(len(values)), key=lambda i: _order(values[i]))


def value(run: Run, view: str, metric: str, level: float = math.nan) -> float:
    return run.at(metric, step_of(run, view, level))
