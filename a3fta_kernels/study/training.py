"""One method on one training set: the steps, and folds of the set that say where to stop.

Batches, noise and levels are functions of the seed and the step, so that two methods of a seed
see the same. The rate is constant after a warm-up: every checkpoint of a run is what a run of so
many steps would have ended with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..train import monitor
from ..train.batches import Order, generator
from ..train.families import Family, Row, stack
from ..train.split import split
from .methods import Method
from .plan import Plan
from .subject import Subject


@dataclass
class Course:
    """A model on its way: `family.denoiser` is at `step`, in eval mode."""

    family: Family
    parameters: list[nn.Parameter]
    step: int
    seconds: list[float]  # of the steps

    @property
    def step_ms(self) -> float:
        """The median; the first steps also make what later ones reuse."""
        return 1000 * median(self.seconds[3:] or self.seconds) if self.seconds else math.nan


def train(
    subject: Subject, method: Method, rate: float, chosen: Sequence[int], seed: int, plan: Plan
) -> Iterator[Course]:
    """Yields at every checkpoint of the plan."""
    family = subject.fresh()
    model = family.denoiser
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator(seed, "start"))))
    course = Course(family, method.prepare(model), 0, [])
    optimizer = torch.optim.AdamW(course.parameters, lr=rate, weight_decay=0.0, fused=True)
    warmth = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / plan.warmup))
    start = [p.detach().clone() for p in course.parameters] if method.pull else []
    order = _order(subject, chosen, plan.batch, seed)
    device = next(model.parameters()).device
    model.train()
    for step in range(1, plan.checkpoints[-1] + 1):
        began = _clock(device)
        rows = [subject.rows[i] for i in order[step - 1]]
        loss = _loss(family, rows, generator(seed, "batch", step), device)
        if method.pull:
            moved = zip(course.parameters, start, strict=True)
            pulled = torch.stack([(p - p0).square().sum() for p, p0 in moved]).sum()
            loss = loss + method.pull / 2 * pulled
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(course.parameters, 1.0)
        optimizer.step()
        warmth.step()
        course.seconds.append(_clock(device) - began)
        if step in plan.checkpoints:
            course.step = step
            model.eval()
            yield course
            model.train()


def _clock(device: torch.device) -> float:
    """Seconds that this process works, or on a GPU that go by until all is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _loss(family: Family, rows: list[Row], draw: torch.Generator, device: Any) -> Tensor:
    batch = stack(rows)
    x = family.clean(batch, draw)
    noise = torch.randn(x.shape, generator=draw)
    level = family.noise.draw(len(x), draw)
    noisy = family.noise.noisy(x, noise, level).to(device)
    target = family.noise.target(x, noise, level).to(device)
    told = {name: value.to(device) for name, value in batch.items()}
    prediction = family.predict(family.denoiser, noisy, family.noise.time(level).to(device), told)
    return (prediction.float() - target).square().mean()


def _order(subject: Subject, chosen: Sequence[int], batch: int, seed: int) -> Order:
    by_shape: dict[torch.Size, list[int]] = {}
    for i in chosen:
        by_shape.setdefault(subject.rows[i]["mean"].shape, []).append(i)
    return Order(tuple(map(tuple, by_shape.values())), batch, seed)


def losses(
    family: Family, rows: Sequence[Row], digests: Sequence[str], chosen: Sequence[int],
    draws: int, plan: Plan,
) -> list[float]:  # fmt: skip
    """Mean squared error per range of noise levels, on noise that is the same for all methods."""
    asked = monitor.questions(chosen, digests, plan.bins, draws, seed=0)
    device = next(family.denoiser.parameters()).device
    return monitor.losses(family, rows, asked, plan.bins, plan.evaluation_batch, device)


def mean(values: Sequence[float]) -> float:
    """NaN where a model has diverged."""
    found = monitor.mean(values)
    return math.nan if found is None else found


def stopping(
    subject: Subject, method: Method, rate: float, chosen: Sequence[int], seed: int, plan: Plan
) -> tuple[int, list[dict[str, Any]]]:
    """The checkpoint with the lowest loss of images left out of folds, and that curve.

    A fold ends after `plan.patience` checkpoints without a lower loss; curves are compared over
    the checkpoints that all folds reached, as the recipe does.
    """
    labels = None if subject.labels is None else [subject.labels[i] for i in chosen]
    parts = split(len(chosen), "kfold", folds=plan.folds, seed=seed, groups=labels).folds
    curves = []
    for part in parts:
        left_out = [chosen[i] for i in part]
        rest = [i for i in chosen if i not in left_out]
        curve: list[dict[str, Any]] = []
        for course in train(subject, method, rate, rest, seed, plan):
            found = losses(
                course.family, subject.rows, subject.digests, left_out, plan.fold_draws, plan
            )
            curve.append({"step": course.step, "heldout_mean": monitor.mean(found)})
            if monitor.exhausted(curve, plan.patience):
                break
        curves.append(curve)
    mixed = monitor.average(curves, [len(part) for part in parts])
    best = monitor.best_step(mixed)
    return plan.checkpoints[-1] if best is None else best, mixed
