"""The four hypotheses, as written in PLAN.md, those about a contender, and what the runs say.

A hypothesis is a list of claims that must all hold, so its p is the largest of theirs; Holm's
correction is over all that are judged. It is not supported where the interval of a claim lies on
the wrong side of its bound as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .methods import BASELINE, METHODS
from .statistics import Difference, difference, holm
from .views import Run, value

# the margins: KID in percent of the base's, recall and copies as shares, losses as they are
KID_MARGIN, RECALL_MARGIN, COPIES_MARGIN, GAP_MARGIN = 2.0, 0.05, 0.05, 0.02
LEVEL = 0.05
_FEWEST = 3  # seeds

# (k, seed) is the same in all of them; method -> run
BySeed = Mapping[int, Mapping[str, Run]]


@dataclass(frozen=True)
class Claim:
    """The mean over seeds of `metric` of `method` less that of `rival` (None: less nothing) is
    above the bound, or below it. view: where both are taken, or the rival at `rival_view`."""

    metric: str
    method: str
    rival: str | None
    view: str
    above: bool
    bound: float
    rival_view: str = ""

    def difference(self, runs: BySeed) -> Difference:
        """Of the seeds that have both."""
        scale = 1.0
        if self.metric.startswith("kid"):
            bases = [r[BASELINE].at(self.metric, 0) for r in runs.values() if BASELINE in r]
            scale = 100 * len(bases) / math.fsum(bases) if bases else math.nan
        found = []
        for seed in sorted(runs):
            pair = [runs[seed].get(name) for name in (self.method, self.rival) if name]
            if None not in pair:
                views = (self.view, self.rival_view or self.view)
                ours, *theirs = [
                    scale * value(run, view, self.metric)
                    for run, view in zip(pair, views, strict=False) if run
                ]  # fmt: skip
                found.append(ours - math.fsum(theirs))
        return difference(found)

    def p(self, runs: BySeed) -> float:
        found = self.difference(runs)
        return found.p_above(self.bound) if self.above else found.p_below(self.bound)

    def refuted(self, runs: BySeed) -> bool:
        found = self.difference(runs)
        return found.high < self.bound if self.above else found.low > self.bound

    def __str__(self) -> str:
        unit = " % of the base's" if self.metric.startswith("kid") else ""
        than = f" less that of {self.rival}" if self.rival else ""
        than += f" ({self.rival_view})" if self.rival_view else ""
        side = "above" if self.above else "below"
        return f"{self.metric} of {self.method}{than}, {self.view}: {side} {self.bound:g}{unit}"


@dataclass(frozen=True)
class Either:
    """At least one of the claims holds (Bonferroni's p)."""

    claims: tuple[Claim, ...]

    def p(self, runs: BySeed) -> float:
        return min(1.0, len(self.claims) * min(claim.p(runs) for claim in self.claims))

    def refuted(self, runs: BySeed) -> bool:
        return all(claim.refuted(runs) for claim in self.claims)

    def __str__(self) -> str:
        return " or ".join(map(str, self.claims))


@dataclass(frozen=True)
class Hypothesis:
    name: str
    text: str
    claims: tuple[Claim | Either, ...]


def _beats(
    method: str, rival: str, view: str, rival_view: str = ""
) -> tuple[Claim | Either, ...]:  # fmt: skip
    """In KID and recall at least non-inferior, and better in one of them."""

    def kid(bound: float) -> Claim:
        return Claim("kid", method, rival, view, False, bound, rival_view)

    def recall(bound: float) -> Claim:
        return Claim("recall", method, rival, view, True, bound, rival_view)

    return (kid(KID_MARGIN), recall(-RECALL_MARGIN), Either((kid(0.0), recall(0.0))))


HYPOTHESES = (
    Hypothesis(
        "H1",
        "full tuning overfits",
        (
            Claim("gap", "full", BASELINE, "last", True, GAP_MARGIN),
            Claim("copies", "full", None, "last", True, COPIES_MARGIN),
        ),
    ),
    Hypothesis(
        "H2",
        "attention-only tuning overfits less than full tuning",
        (
            Claim("gap", "attention", "full", "last", False, 0.0),
            Claim("copies", "attention", "full", "last", False, 0.0),
        ),
    ),
    Hypothesis(
        "H3",
        "the adapter improves on attention-only tuning",
        (
            Claim("kid", "adapter+attention", "attention", "early", False, 0.0),
            Claim("recall", "adapter+attention", "attention", "early", True, -RECALL_MARGIN),
        ),
    ),
    Hypothesis(
        "H4",
        "A3FTA beats full tuning, last and early-stopped, and LoRA",
        (
            *_beats("gelu", "full", "last"),
            *_beats("gelu", "full", "early"),
            *_beats("gelu", "lora", "early"),
        ),
    ),
)


# the designs that the recipe trains
_PLAIN = ("gelu", "film")


def contest(contender: str) -> tuple[Hypothesis, ...]:
    """About a design that a search has found, on seeds that the search has not seen."""
    rival = METHODS[contender].rival or "lora-slow"
    return (
        Hypothesis(
            "H5",
            f"{contender} beats full tuning, to the end and stopped by folds",
            (
                *_beats(contender, "full", "last"),
                *_beats(contender, "full-slow", "last"),
                *_beats(contender, "full", "passes"),
                *_beats(contender, "full", "passes", "early"),
            ),
        ),
        Hypothesis(
            "H6",
            f"{contender} beats {rival}, which reaches as far without A3FTA",
            (*_beats(contender, rival, "last"), *_beats(contender, rival, "passes")),
        ),
        Hypothesis(
            "H7",
            f"{contender} beats attention-only tuning and LoRA",
            tuple(
                claim
                for name in ("attention", "lora-slow")
                for claim in _beats(contender, name, "passes")
            ),
        ),
        Hypothesis(
            "H8",
            "of adapters, as many passes as folds made are better than as many steps",
            tuple(
                claim
                for name in dict.fromkeys((contender, *_PLAIN))
                for claim in (
                    Claim("kid", name, name, "passes", False, 0.0, "early"),
                    Claim("recall", name, name, "passes", True, -RECALL_MARGIN, "early"),
                )
            ),
        ),
    )


def contestants(contender: str) -> tuple[str, ...]:
    """Whom the hypotheses about it are of, the base first. Raises ValueError for a contender that
    would be measured against itself."""
    names = {BASELINE: None, contender: None}
    for hypothesis in contest(contender):
        for claim in singles(hypothesis):
            if claim.rival == claim.method and not claim.rival_view:
                raise ValueError(f"contender: expected none of its rivals, got {contender!r}")
            names |= dict.fromkeys(name for name in (claim.method, claim.rival) if name)
    return tuple(names)


@dataclass(frozen=True)
class Verdict:
    """p: before Holm's correction; corrected: after it. word: what it comes to."""

    hypothesis: Hypothesis
    seeds: int
    p: float
    corrected: float
    word: str


def judge(
    runs: Sequence[Run], k: int, hypotheses: Sequence[Hypothesis] = HYPOTHESES
) -> list[Verdict]:  # fmt: skip
    """One verdict per hypothesis, from the runs of that k."""
    by_seed: dict[int, dict[str, Run]] = {}
    for run in runs:
        if run.k == k:
            by_seed.setdefault(run.seed, {})[run.method] = run
    found = [max(claim.p(by_seed) for claim in h.claims) for h in hypotheses]
    verdicts = []
    for hypothesis, p, corrected in zip(hypotheses, found, holm(found), strict=True):
        seeds = min(single.difference(by_seed).count for single in singles(hypothesis))
        word = "inconclusive"
        if seeds < _FEWEST:
            word = "too few runs"
        elif corrected < LEVEL:
            word = "supported"
        elif any(claim.refuted(by_seed) for claim in hypothesis.claims):
            word = "not supported"
        verdicts.append(Verdict(hypothesis, seeds, p, corrected, word))
    return verdicts


def singles(hypothesis: Hypothesis) -> list[Claim]:
    """Every claim, those of an `Either` too."""
    return [
        single
        for claim in hypothesis.claims
        for single in (claim.claims if isinstance(claim, Either) else (claim,))
    ]
