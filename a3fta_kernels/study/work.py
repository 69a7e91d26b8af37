"""The work of a study, from what is missing: trials, then runs, a process each, to two CSVs.

The processes compute, this one writes: a line at a time, as a run is finished. Whatever is cut
off, at the next start what is in the files is done and the rest is not.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice, takewhile
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

from ..train.errors import TrainingError
from . import run as runs
from .figures import sheet_path
from .methods import METHODS
from .plan import Plan
from .subject import Subject
from .table import Line, Table, numbers, shown

Load = Callable[[], Subject]


@dataclass(frozen=True)
class Job:
    """A call of `run.run` or `run.trial`; what it needs can be sent to a process."""

    kind: str  # "run" or "trial"
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return " ".join([self.kind, *map(str, self.arguments[:4])])


def trials(folder: Path, plan: Plan) -> Table:
    return Table(folder / "tuning.csv", runs.TRIAL_COLUMNS, runs.TRIAL_KEY, plan.digest())


def results(folder: Path, plan: Plan) -> Table:
    return Table(folder / "runs.csv", runs.columns(plan), runs.KEY, plan.digest())


def missing_trials(table: Table, plan: Plan) -> list[Job]:
    done = {table.name(line) for line in table.read()}
    return [
        Job("trial", (name, rate, seed))
        for name, rate, seed in plan.trials()
        if (plan.pair, name, shown(rate), str(seed)) not in done
    ]


def missing_runs(
    table: Table, plan: Plan, rates: Mapping[str, float], sheets: Path
) -> list[Job]:  # fmt: skip
    """Raises TrainingError for a run at another learning rate than the frozen one."""
    done = set()
    for line in table.read():
        name, rate = line["method"], line["rate"]
        if name in rates and rate != shown(rates[name]):
            raise TrainingError(
                f"{table.path}: {name}, k {line['k']}, seed {line['seed']} was trained at {rate}, "
                f"the rate of the trials, or the one that is given, is {shown(rates[name])}"
            )
        done.add(table.name(line))
    jobs = []
    for name, k, seed in plan.runs():
        if (plan.pair, name, str(k), str(seed)) not in done:
            # of one seed: the report shows them side by side
            shown_too = (k, seed) == (plan.ks[0], plan.seeds[0])
            sheet = sheet_path(sheets, name, k, seed) if shown_too else None
            jobs.append(Job("run", (name, k, seed, rates.get(name, 0.0), sheet)))
    return jobs


def rates(
    lines: Sequence[Line], plan: Plan, given: Mapping[str, float]
) -> dict[str, float]:  # fmt: skip
    """Of each method the learning rate with the lowest mean, over the tuning seeds, of the lowest
    held-out loss, or the one that is given. Raises TrainingError while trials are missing."""
    found: dict[str, float] = {}
    for name in plan.trained():
        if name in given:
            found[name] = given[name]
            continue
        means = {}
        for rate in METHODS[name].trials:
            here = [
                line for line in lines
                if line["method"] == name and line["rate"] == shown(rate)
            ]  # fmt: skip
            if {int(line["seed"]) for line in here} != set(plan.tuning_seeds):
                raise TrainingError(f"trials: {name} at {rate:g} is not tried yet on every seed")
            best = [numbers(line["best"])[0] for line in here]
            means[rate] = math.fsum(best) / len(best)
        found[name] = min(means, key=lambda rate: (math.isnan(means[rate]), means[rate]))
    return found


# of a worker process: loaded once, used by all of its jobs
_loaded: tuple[Subject, Plan] | None = None


def _subject(load: Load, plan: Plan, jobs: Sequence[Job]) -> Subject:
    """Raises ValueError where it has too few images for the plan, before a run needs them."""
    subject = load()
    for k in plan.ks:
        subject.check(k)
    if any(job.kind == "trial" for job in jobs):
        subject.check(plan.tuning_k, "tuning")
    return subject


def _start(subject: Subject, plan: Plan) -> None:
    import torch

    global _loaded
    # as many processes as cores, and the models are small
    torch.set_num_threads(1)
    _loaded = subject, plan


def _float32() -> None:
    """All of it, convolutions on a GPU too."""
    import torch

    torch.backends.cudnn.allow_tf32 = False


def _start_process(load: Load, plan: Plan) -> None:
    _float32()
    parent = parent_process()
    if parent is not None:
        # Ctrl-C is told by the parent alone
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        Thread(target=_end_with, args=(parent,), daemon=True).start()
    _start(load(), plan)


def _end_with(parent: Any) -> None:
    """A killed parent cannot end its processes, which would wait for more to do for ever."""
    parent.join()
    os._exit(1)


def _do(job: Job) -> dict[str, Any]:
    assert _loaded is not None
    return getattr(runs, job.kind)(*_loaded, *job.arguments)


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process was ended from outside, perhaps for its memory; what was finished is kept. "
            "Start again, with fewer --processes if memory is short"
        ) from error


def work(
    jobs: Sequence[Job], load: Load, plan: Plan, processes: int, end: float = math.inf
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Yields every job with its line, as they are finished; `load` must be picklable. None begins
    after `end`, of time.monotonic."""
    if not jobs:
        return
    # here first: what it makes is made once, and what is wrong with it is told as it is
    _float32()
    subject = _subject(load, plan, jobs)
    if processes == 1:
        _start(subject, plan)
        for job in takewhile(lambda _: time.monotonic() < end, jobs):
            yield job, _do(job)
        return
    del subject
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (load, plan)) as pool:
        waiting: dict[Future[dict[str, Any]], Job] = {}
        queue = takewhile(lambda _: time.monotonic() < end, jobs)
        failed: Future[dict[str, Any]] | None = None
        try:
            # few are handed out ahead, so that an interrupted study ends soon
            for job in islice(queue, processes):
                waiting[pool.submit(_do, job)] = job
            while waiting:
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                # one that failed ends the study, after what the others have finished
                for future in done:
                    job = waiting.pop(future)
                    if future.exception() is not None:
                        failed = future
                        continue
                    yield job, future.result()
                    for job in islice(queue, 0 if failed else 1):
                        waiting[pool.submit(_do, job)] = job
            if failed:
                _result(failed)
        finally:
            pool.shutdown(cancel_futures=True, wait=False)
