from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Barrier

import pytest

from a3fta_kernels.study import work
from a3fta_kernels.study.methods import METHODS
from a3fta_kernels.train.errors import TrainingError
from tests.study import tiny

RATES = {"full": 1e-3, "gelu": 1e-2}


def trial(name, rate, seed, best):
    return {"pair": "bars", "method": name, "rate": rate, "seed": seed, "steps": [2], "heldout": [
        best], "best": best}  # fmt: skip


def tried(folder, plan, best):
    """Every trial done; `best` is of (method, rate, seed)."""
    table = work.trials(folder, plan)
    for name, rate, seed in plan.trials():
        table.append(trial(name, rate, seed, best(name, rate, seed)))
    return table


def test_what_is_in_the_file_is_not_done_again(tmp_path):
    plan = tiny.plan()
    table = work.trials(tmp_path, plan)
    jobs = work.missing_trials(table, plan)
    assert len(jobs) == 2 * len(METHODS["full"].trials)
    for job in jobs[:3]:
        table.append(trial(*job.arguments, 0.5))
    assert work.missing_trials(table, plan) == jobs[3:]


def test_the_rate_is_of_the_lowest_mean_over_seeds(tmp_path):
    plan = tiny.plan(tuning_seeds=(100, 101))
    second = {name: METHODS[name].trials[1] for name in RATES}

    def best(name, rate, seed):
        if rate == second[name]:
            return 0.4
        # lower on one seed, higher on the other
        return 0.1 if seed == 100 else 0.9

    table = tried(tmp_path, plan, best)
    assert work.rates(table.read(), plan, {}) == second
    assert work.rates(table.read(), plan, {"full": 7.0}) == second | {"full": 7.0}


def test_a_rate_that_diverged_is_not_chosen(tmp_path):
    first = {name: METHODS[name].trials[0] for name in RATES}
    table = tried(
        tmp_path, tiny.plan(), lambda name, rate, _: float("nan") if rate != first[name] else 0.9
    )
    assert work.rates(table.read(), tiny.plan(), {}) == first


def test_rates_need_every_trial(tmp_path):
    plan = tiny.plan()
    table = work.trials(tmp_path, plan)
    for job in work.missing_trials(table, plan)[:-1]:
        table.append(trial(*job.arguments, 0.5))
    with pytest.raises(TrainingError, match=r"gelu at 0\.03 is not tried yet on every seed"):
        work.rates(table.read(), plan, {})


def test_runs_at_another_rate_are_refused(tmp_path):
    plan = tiny.plan()
    jobs = work.missing_runs(work.results(tmp_path, plan), plan, RATES, tmp_path)
    assert [job.arguments[:3] for job in jobs] == list(plan.runs())
    assert {job.arguments[3] for job in jobs if job.arguments[0] == "gelu"} == {1e-2}
    assert sum(job.arguments[4] is not None for job in jobs) == 3  # one of each method is shown
    table = work.results(tmp_path, plan)
    cells = dict.fromkeys(table.columns, 0)
    table.append(cells | {"pair": "bars", "method": "full", "k": 6, "seed": 0, "rate": 1e-3})
    again = work.missing_runs(table, plan, RATES, tmp_path)
    assert again == [job for job in jobs if job.arguments[:3] != ("full", 6, 0)]
    with pytest.raises(TrainingError, match=r"full, k 6, seed 0 was trained at 0.001, .* is 0.01"):
        work.missing_runs(table, plan, RATES | {"full": 1e-2}, tmp_path)


def test_several_at_once_do_what_one_does(monkeypatch):
    """In threads, which start sooner; a process of its own needs what can be sent to it."""
    plan = tiny.plan()
    monkeypatch.setattr(work.runs, "trial", lambda subject, _, *job: {"of": (subject.name, *job)})
    jobs = [work.Job("trial", ("full", rate, 100)) for rate in (1e-3, 1e-2, 3e-2)]
    alone = list(work.work(jobs, tiny.make, plan, 1))
    assert [job for job, _ in alone] == jobs
    assert pickle.loads(pickle.dumps((tiny.make, plan, jobs)))[1:] == (plan, jobs)
    monkeypatch.setattr(work, "ProcessPoolExecutor", ThreadPoolExecutor)
    assert dict(work.work(jobs, tiny.make, plan, 2)) == dict(alone)
    assert list(work.work([], tiny.make, plan, 2)) == []


def test_an_interrupted_study_hands_out_nothing_more(monkeypatch):
    begun = []
    monkeypatch.setattr(work, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(work.runs, "trial", lambda *job: begun.append(job) or {})
    jobs = [work.Job("trial", (i,)) for i in range(9)]
    for _ in work.work(jobs, tiny.make, tiny.plan(), 2):
        break
    assert 1 <= len(begun) <= 2


def test_a_process_that_is_killed_is_told(monkeypatch):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(work, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(work.runs, "trial", killed)
    with pytest.raises(TrainingError, match="what was finished is kept"):
        list(work.work([work.Job("trial", (0,))], tiny.make, tiny.plan(), 2))


def test_what_cannot_be_loaded_is_told_as_it_is_before_a_process_starts(monkeypatch):
    def damaged():
        raise TrainingError("base is damaged")

    monkeypatch.setattr(work, "ProcessPoolExecutor", None)
    jobs = [work.Job("trial", ("full", 1e-3, 100))]
    with pytest.raises(TrainingError, match="base is damaged"):
        next(work.work(jobs, damaged, tiny.plan(), 2))
    for told, plan in (("^k", tiny.plan(ks=(6, 20))), ("tuning_k", tiny.plan(tuning_k=10))):
        with pytest.raises(ValueError, match=f"{told}: expected less than"):
            next(work.work(jobs, tiny.make, plan, 2))
    # with given rates there is nothing to tune
    monkeypatch.setattr(work.runs, "run", lambda *_: {})
    runs = [work.Job("run", ("full", 6, 0, 1e-3, None))]
    assert list(work.work(runs, tiny.make, tiny.plan(tuning_k=10), 1)) == [(runs[0], {})]


def test_what_others_finish_is_kept_when_one_fails(monkeypatch):
    both = Barrier(2, timeout=30)

    def job(subject, plan, name):
        if name in ("bad", "good"):
            both.wait()
        if name == "bad":
            raise ValueError("bad")
        time.sleep(0.1)
        return {}

    monkeypatch.setattr(work, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(work.runs, "trial", job)
    jobs, kept = [work.Job("trial", (name,)) for name in ("bad", "good", "next")], []
    with pytest.raises(ValueError, match="bad"):
        for done, _ in work.work(jobs, tiny.make, tiny.plan(), 2):
            kept.append(str(done))
    assert kept == ["trial good"]


def test_processes_end_with_their_parent_and_leave_an_interruption_to_it():
    """A parent that is killed, whose child is told by the end of its output."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        from multiprocessing import get_context
        def child():
            from a3fta_kernels.study import work
            work._start_process(lambda: None, None)
            quiet = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
            print("quiet" if quiet else "loud", flush=True)
            time.sleep(60)
        if __name__ == "__main__":
            get_context("fork").Process(target=child).start()
            time.sleep(60)
        """
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"quiet\n"
        os.kill(parent.pid, signal.SIGKILL)
        began = time.monotonic()
        assert parent.stdout.read() == b""  # the end: no process holds it open
        assert time.monotonic() - began < 30
