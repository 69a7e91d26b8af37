"""One run, and one trial of a learning rate: from a subject to a line of a results file."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..memory.peak import step_peak
from ..memory.saved import ledger
from ..train.families import Family, stack
from . import metrics
from .figures import keep_samples
from .methods import BASELINE, METHODS, Method
from .plan import Plan
from .subject import Subject
from .training import Course, losses, mean, stopping, train

KEY = ("pair", "method", "k", "seed")
TRIAL_KEY = ("pair", "method", "rate", "seed")
TRIAL_COLUMNS = ("plan", *TRIAL_KEY, "steps", "heldout", "best")


def columns(plan: Plan) -> tuple[str, ...]:
    """Of a run's line."""
    facts = ("rate", "parameters", "step_ms", "peak_bytes", "saved_bytes", "seconds", "early")
    return ("plan", *KEY, *facts, *_curves(plan), "fold_steps", "fold_losses")


def _curves(plan: Plan) -> tuple[str, ...]:
    """Whose cells are lists, of a value per checkpoint; _2: of the second features."""
    samples = (*metrics.NAMES, *(f"{name}_2" for name in metrics.NAMES))
    bins = [f"{part}_bin{i}" for part in ("train", "heldout") for i in range(1, plan.bins + 1)]
    return ("steps", "train", "heldout", "source", *samples, *bins)


def run(
    subject: Subject, plan: Plan, name: str, k: int, seed: int, rate: float,
    sheet: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains, chooses where to stop inside k, and measures every checkpoint.

    sheet: a PNG of some samples of every checkpoint, for the report.
    """
    began, method = time.process_time(), METHODS[name]
    chosen = subject.subset(k, seed)
    judge = _Judge(subject, plan, chosen, seed)
    drawn: dict[int, list[Image.Image]] = {}
    line: dict[str, Any] = {
        "pair": plan.pair, "method": name, "k": k, "seed": seed, "rate": rate,
        "fold_steps": [], "fold_losses": [], **{name: [] for name in _curves(plan)},
    }  # fmt: skip
    if name == BASELINE:
        family = subject.fresh()
        method.prepare(family.denoiser)
        family.denoiser.eval()
        drawn[0] = judge.measure(line, 0, family)
        line |= {"early": 0, "step_ms": math.nan, **_costs(subject, method, plan)}
    else:
        line["early"], curve = stopping(subject, method, rate, chosen, seed, plan)
        line["fold_steps"] = [entry["step"] for entry in curve]
        line["fold_losses"] = [_number(entry["heldout_mean"]) for entry in curve]
        course: Course | None = None
        for course in train(subject, method, rate, chosen, seed, plan):
            drawn[course.step] = judge.measure(line, course.step, course.family)
        assert course is not None
        line |= {"step_ms": course.step_ms, **_costs(subject, method, plan)}
    if sheet is not None:
        keep_samples(sheet, drawn, [subject.images[i] for i in chosen])
    line["seconds"] = time.process_time() - began
    return line


def trial(subject: Subject, plan: Plan, name: str, rate: float, seed: int) -> dict[str, Any]:
    """A learning rate on images apart: the held-out loss at every checkpoint, and its lowest."""
    chosen = subject.subset(plan.tuning_k, seed, "tuning")
    steps, found = [], []
    for course in train(subject, METHODS[name], rate, chosen, seed, plan):
        steps.append(course.step)
        part = subject.parts["tuning_heldout"]
        asked = (subject.rows, subject.digests, part, plan.heldout_draws, plan)
        found.append(mean(losses(course.family, *asked)))
        if len(found) - found.index(_least(found)) > plan.patience:
            break
    return {
        "pair": plan.pair, "method": name, "rate": rate, "seed": seed, "steps": steps,
        "heldout": found, "best": _least(found),
    }  # fmt: skip


def _least(values: Sequence[float]) -> float:
    """Of those that are numbers; the first where none is."""
    return min((v for v in values if math.isfinite(v)), default=values[0])


def _number(value: float | None) -> float:
    return math.nan if value is None else value


class _Judge:
    """Measures checkpoints of runs on one training set."""

    def __init__(self, subject: Subject, plan: Plan, chosen: Sequence[int], seed: int) -> None:
        self.subject, self.plan, self.chosen = subject, plan, chosen
        self.conditions = subject.conditions(chosen, plan.samples)
        self.seeds = [10_000 * (seed + 1) + i for i in range(plan.samples)]
        self.train = {e: subject.features(e, chosen) for e in subject.extractors}
        self.real = {e: subject.features(e, subject.parts["reference"]) for e in self.train}

    def measure(self, line: dict[str, Any], step: int, family: Family) -> list[Image.Image]:
        """Adds one entry to every list of the line; the samples."""
        subject, plan = self.subject, self.plan
        line["steps"].append(step)
        draws = max(1, round(plan.draws / len(self.chosen)))
        heldout = subject.parts["heldout"]
        for part, images, count in (
            ("train", self.chosen, draws), ("heldout", heldout, plan.heldout_draws),
        ):  # fmt: skip
            found = losses(family, subject.rows, subject.digests, images, count, plan)
            line[part].append(mean(found))
            for i, value in enumerate(found, 1):
                line[f"{part}_bin{i}"].append(value)
        line["source"].append(self._forgetting(family))
        samples = self._draw(family)
        for suffix, extractor in zip(("", "_2"), self.train, strict=False):
            features = subject.extractors[extractor](samples)
            worth = metrics.measure(features, self.train[extractor], self.real[extractor])
            for name, value in worth.items():
                line[f"{name}{suffix}"].append(value)
        return samples

    def _forgetting(self, family: Family) -> float:
        """The loss of source images; NaN where there are none."""
        source = self.subject.source
        if not source:
            return math.nan
        names = [f"source {i}" for i in range(len(source))]
        every, draws = range(len(source)), self.plan.heldout_draws
        return mean(losses(family, source, names, every, draws, self.plan))

    def _draw(self, family: Family) -> list[Image.Image]:
        plan, size = self.plan, self.plan.evaluation_batch
        found: list[Image.Image] = []
        device = next(family.denoiser.parameters()).device
        with family.drawing(device):
            for start in range(0, plan.samples, size):
                part = slice(start, min(start + size, plan.samples))
                found += family.draw(
                    self.conditions[part], self.subject.empty, self.subject.size,
                    plan.sample_steps, plan.guidance, self.seeds[part],
                )  # fmt: skip
        return found


def _costs(subject: Subject, method: Method, plan: Plan) -> dict[str, int]:
    """Parameters that train, bytes kept for the backward, the most at once: counted, not timed."""
    family = subject.fresh()
    parameters = method.prepare(family.denoiser)
    count = sum(p.numel() for p in parameters)
    if not count:
        return {"parameters": 0, "peak_bytes": 0, "saved_bytes": 0}
    batch = stack([subject.rows[subject.parts["pool"][0]]] * plan.batch)
    noisy, level = batch["mean"], torch.full((plan.batch,), 0.5)
    inputs = family.inputs(noisy, family.noise.time(level), batch)
    model: nn.Module = family.denoiser.train()
    return {
        "parameters": count,
        "peak_bytes": step_peak(model, **inputs).bytes,
        "saved_bytes": ledger(model, **inputs).total,
    }
