"""A study from what is there to what is missing: trials, rates, runs, report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..train.errors import TrainingError
from . import work
from .plan import Plan
from .report import write_report
from .work import Job, Load

STAGES = ("tune", "run", "report")


def conduct(
    folder: Path, plan: Plan, load: Load, *, processes: int, stages: tuple[str, ...] = STAGES,
    limit: int | None = None, minutes: float = math.inf,
    given: Mapping[str, float] | None = None, report: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Does what is missing of each stage, in `folder`, which must be this study's alone, but for a
    report, which only reads.

    limit: of trials and runs that are done now; minutes: after which none begins.
    given: learning rates that are not looked for. report: where it is written (STUDY.md of the
    folder).
    Raises TrainingError for files of another plan, before anything is computed, and for a report
    of a folder that is not there.
    """
    if stages == ("report",) and not folder.is_dir():
        raise TrainingError(f"folder: expected one with a study's results, got {folder}")
    given, end = dict(given or {}), time.monotonic() + 60 * minutes
    trials, results = work.trials(folder, plan), work.results(folder, plan)
    for table in (trials, results):
        table.read()
        if stages != ("report",):
            table.mend()
    if "tune" in stages:
        jobs = [job for job in work.missing_trials(trials, plan) if job.arguments[0] not in given]
        limit = _do(jobs, trials, load, plan, processes, limit, end, say)
    if "run" in stages and limit != 0 and time.monotonic() < end:
        rates = work.rates(trials.read(), plan, given)
        say("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items()))
        jobs = work.missing_runs(results, plan, rates, folder / "samples")
        _do(jobs, results, load, plan, processes, limit, end, say)
    if "report" in stages:
        say(str(write_report(folder, plan, results.read(), trials.read(), report)))


def _do(
    jobs: list[Job], table: work.Table, load: Load, plan: Plan, processes: int,
    limit: int | None, end: float, say: Callable[[str], None],
) -> int | None:  # fmt: skip
    """What is left of the limit."""
    began = time.monotonic()
    todo = jobs[:limit]
    for done, (job, line) in enumerate(work.work(todo, load, plan, processes, end), 1):
        table.append(line)
        spent = time.monotonic() - began
        left = spent / done * (len(todo) - done)
        say(f"{job}: {done} of {len(todo)} in {spent:.0f} s, about {left / 60:.0f} min to go")
    return None if limit is None else limit - len(todo)
