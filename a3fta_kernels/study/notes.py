"""The end of STUDY.md: what a cell is, and what stands against the plan that it is of."""

from __future__ import annotations

from collections.abc import Sequence

from .hypotheses import COPIES_MARGIN, GAP_MARGIN, KID_MARGIN, LEVEL, RECALL_MARGIN
from .methods import BASELINE
from .plan import Plan
from .views import Run, step_of


def lines(plan: Plan, runs: Sequence[Run]) -> list[str]:
    objections = _of_a_search() if plan.search else _of_rates(bool(plan.contender))
    if plan.judges:
        objections.append(_OF_VERDICTS)
    return [
        "## How to read it",
        "",
        "- Cells are means over seeds, ± half of the 95 % interval. Runs of a seed share "
        "training images, batches, noise and what samples start from; only seeds that all "
        "methods have are in the tables.",
        "- KID is in percent of the base's; precision, recall, coverage and near-copies are in "
        "percent. A near-copy is closer to a training image than 99 % of real images that "
        "nobody trained on.",
        *([_MARGINS] if plan.judges else []),
        "- Held-out images are for measuring alone; *oracle* stops by them, which nobody can.",
        "- An adapter can be switched off: then nothing of the source is forgotten. The source "
        "loss is with it on.",
        "",
        "## What to hold against it",
        "",
        *objections,
        f"- {_settled(runs)} For the others *converged* is the last step.",
        "- Seeds share one base, one reference, one held-out set and one pool: the intervals "
        "are about these, and subsets of a larger k overlap.",
    ]


_MARGINS = (
    f"- Margins: KID {KID_MARGIN:g} points, recall {RECALL_MARGIN:g}, copies {COPIES_MARGIN:g}, "
    f"gap {GAP_MARGIN:g}; level {LEVEL:g}, Holm over all."
)


_OF_VERDICTS = (
    "- *Supported* is corrected for all hypotheses; *not supported* rests on one interval that is "
    "not."
)


def _of_rates(contest: bool) -> list[str]:
    share = (
        "`full-slow` beside `full` says how much of it is the rate's; of the others nothing does."
        if contest
        else "How much of what *last* shows is the rate's, this plan cannot say."
    )
    return [
        "- A learning rate is chosen by the lowest loss at any step, and *last* judges the "
        f"last one: a lower rate with about the same lowest loss would overfit later. {share}",
    ]


def _of_a_search() -> list[str]:
    return [
        "- The best of many by the means of few seeds looks better than it is. The rule says what "
        "goes on trial; only seeds that it has not seen say what that is worth.",
        "- What it trains on and what it compares with are other images than the study's, and "
        "fewer: cells are for comparing with each other, not with those of the study.",
    ]


def _settled(runs: Sequence[Run]) -> str:
    tuned = [run for run in runs if run.method != BASELINE]
    settled = sum(step_of(run, "converged") < run.steps[-1] for run in tuned)
    return f"{settled} of {len(tuned)} runs had converged before their last step."
