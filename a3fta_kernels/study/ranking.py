"""Which candidate a search chooses, by the rule that its plan (SEARCH.md) says.

All at the step of view "passes", means over seeds: of candidates that copy little and recall about
as much as full tuning, the one with the lowest KID.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .hypotheses import RECALL_MARGIN
from .methods import BASELINE, CONTROLS, METHODS
from .views import Run, value

COPIES = 0.02
VIEW = "passes"
_RIVAL = "full"


@dataclass(frozen=True)
class Rank:
    """kid: in percent of the base's. reason: why it cannot win; "" where it can."""

    method: str
    kid: float
    recall: float
    copies: float
    heldout: float
    reason: str


def rank(runs: Mapping[str, Sequence[Run]]) -> list[Rank]:
    """By KID. runs: by method, of the same seeds, with those of the base and of full tuning."""
    scale = 100 / _mean([run.at("kid", 0) for run in runs[BASELINE]])

    def at(name: str, metric: str) -> float:
        return _mean([value(run, VIEW, metric) for run in runs[name]])

    least = at(_RIVAL, "recall") - RECALL_MARGIN
    ranks = []
    for name in runs:
        if name == BASELINE:
            continue
        recall, copies = at(name, "recall"), at(name, "copies")
        reasons = {
            "no candidate": name in CONTROLS,
            f"copies, {100 * COPIES:g} % or more": copies >= COPIES,
            f"recall below {100 * least:.1f} %": recall < least,
        }
        reason = ", ".join(told for told, holds in reasons.items() if holds)
        ranks.append(
            Rank(name, scale * at(name, "kid"), recall, copies, at(name, "heldout"), reason)
        )
    return sorted(ranks, key=lambda r: (math.isnan(r.kid), r.kid))


def winner(ranks: Sequence[Rank]) -> Rank | None:
    """The first that can win."""
    return next((r for r in ranks if not r.reason and math.isfinite(r.kid)), None)


def lines(runs: Mapping[str, Sequence[Run]], seeds: int) -> list[str]:
    """The section of a report; seeds: of the plan."""
    head = ["## The rule of the search", ""]
    if not {BASELINE, _RIVAL} <= set(runs):
        return [*head, f"It needs runs of {BASELINE} and {_RIVAL}; they are not in yet.", ""]
    ranks = rank(runs)
    first, count = winner(ranks), len(runs[_RIVAL])
    said = f"**{METHODS[first.method].label}** (`{first.method}`)" if first else "none"
    so_far = "" if count >= seeds else f" **Preliminary: {count} of {seeds} seeds are whole.**"
    table = [
        f"| {METHODS[r.method].label} | {r.kid:.2f} | {100 * r.recall:.1f} | "
        f"{100 * r.copies:.1f} | {r.heldout:.4f} | {r.reason or 'can win'} |"
        for r in ranks
    ]
    return [
        *head,
        f"After as many passes over the images as the folds made; means over {count} seeds. "
        f"It chooses: {said}.{so_far}",
        "",
        "| | KID, % of the base's | recall, % | near-copies, % | held-out | |",
        "|---|---:|---:|---:|---:|---|",
        *table,
        "",
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
