"""The overfit monitor: the loss on photos that train and on photos that do not, at noise levels
and on noise that never change.

Every photo is asked at every range of levels the same number of times, so that the losses of two
steps, two photo sets or two runs differ by the model alone. Which adapter is best, and whether to
stop, follows from what was recorded: a resumed run decides as an unbroken one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import generator
from .families import Family, Row, stack


@dataclass(frozen=True)
class Question:
    """One prediction to make: a photo, a level in 0..1, and where its noise comes from."""

    photo: int
    range: int
    level: float
    key: tuple[int | str, ...]


def ranges(count: int) -> list[tuple[float, float]]:
    """Equal parts of the levels 0..1."""
    return [(i / count, (i + 1) / count) for i in range(count)]


def questions(
    photos: Sequence[int], digests: Sequence[str], bins: int, draws: int, seed: int
) -> list[Question]:
    """`draws` per photo and range, their levels spread over the range by a draw of their own.

    A photo's questions depend on the photo and the seed alone: every fold asks the same.
    """
    found = []
    for photo in photos:
        for part, (low, high) in enumerate(ranges(bins)):
            for draw in range(draws):
                key = ("evaluate", seed, digests[photo], part, draw)
                place = (draw + float(torch.rand((), generator=generator(*key, "level")))) / draws
                found.append(Question(photo, part, low + (high - low) * place, key))
    return found


@torch.no_grad()
def losses(
    family: Family,
    rows: Sequence[Row],
    asked: Sequence[Question],
    bins: int,
    batch: int,
    device: torch.device,
    share: tuple[int, int] = (0, 1),
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
    told: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Mean squared error per range, in fp64. `share` is (rank, processes): each takes a part of
    the questions, and `reduce` adds up over them. `told` hears how many were answered just now."""
    sums = torch.zeros(2, bins, dtype=torch.float64)
    by_size: dict[torch.Size, list[Question]] = {}
    for question in asked[share[0] :: share[1]]:
        by_size.setdefault(rows[question.photo]["mean"].shape, []).append(question)
    for group in by_size.values():
        for start in range(0, len(group), batch):
            part = group[start : start + batch]
            errors = _errors(family, [rows[q.photo] for q in part], part, device)
            for question, error in zip(part, errors.tolist(), strict=True):
                sums[0, question.range] += error
                sums[1, question.range] += 1
            told(len(part))
    total, count = reduce(sums.to(device)).cpu()
    return (total / count).tolist()


def _errors(
    family: Family, rows: list[Row], asked: Sequence[Question], device: torch.device
) -> Tensor:
    """(B,): each question's mean squared error, on the CPU."""
    batch = stack(rows)
    # a draw of its own per question, however they are batched
    clean, noise = [], []
    for row, question in zip(rows, asked, strict=True):
        clean.append(family.clean(stack([row]), generator(*question.key, "photo"))[0])
        noise.append(torch.randn(clean[-1].shape, generator=generator(*question.key, "noise")))
    x, e = torch.stack(clean), torch.stack(noise)
    level = torch.tensor([question.level for question in asked])
    target = family.noise.target(x, e, level).to(device)
    noisy, time = family.noise.noisy(x, e, level).to(device), family.noise.time(level).to(device)
    row = {name: value.to(device) for name, value in batch.items()}
    prediction = family.predict(family.denoiser, noisy, time, row)
    return (prediction.float() - target).square().flatten(1).mean(1).double().cpu()


def mean(values: Sequence[float]) -> float | None:
    """None where a model has diverged: what is not finite is not compared."""
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else None


def best_step(evaluations: Sequence[dict[str, Any]]) -> int | None:
    """The step of the lowest held-out loss, the earliest of equals; step 0 is not a choice, for
    it has no adapter. None where nothing was held out, or no loss of it is finite."""
    judged = [e for e in evaluations if e["step"] > 0 and e.get("heldout_mean") is not None]
    return min(judged, key=lambda e: e["heldout_mean"])["step"] if judged else None


def same_passes(step: int, folds: int) -> int:
    """Steps after which all photos have been seen as often as a fold, which trains without a part
    of `folds`, has seen its own by `step`: it has fewer, and sees each of them more often."""
    return round(step * folds / (folds - 1))


def exhausted(evaluations: Sequence[dict[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations brought no lower held-out loss; 0: never."""
    best = best_step(evaluations)
    if not patience or best is None:
        return False
    return sum(e["step"] > best for e in evaluations) >= patience


def average(
    curves: Sequence[Sequence[dict[str, Any]]], weights: Sequence[int]
) -> list[dict[str, Any]]:
    """Held-out losses of folds as one curve, over the steps that all of them reached; weights
    are the folds' sizes. None at a step where a fold has diverged."""
    common = set.intersection(*({e["step"] for e in curve} for curve in curves))
    found = []
    for step in sorted(common):
        at = [next(e["heldout_mean"] for e in curve if e["step"] == step) for curve in curves]
        whole = None
        if None not in at:
            whole = math.fsum(w * x for w, x in zip(weights, at, strict=True)) / sum(weights)
        found.append({"step": step, "heldout_mean": whole})
    return found
