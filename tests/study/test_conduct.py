from __future__ import annotations

import pytest

from a3fta_kernels.study import work
from a3fta_kernels.study.conduct import conduct
from a3fta_kernels.train.errors import TrainingError
from tests.study import tiny

RATES = {"full": 1e-2, "gelu": 1e-2}


@pytest.fixture
def quick(monkeypatch):
    """Runs that are not run: a line of what was asked for. What was computed, in order."""
    from a3fta_kernels.study import run

    done = []

    def fake_run(subject, plan, name, k, seed, rate, sheet=None):
        done.append((name, k, seed))
        steps = [0] if name == "base" else list(plan.checkpoints)
        columns = run.columns(plan)
        lists = {c: [0.5] * len(steps) for c in columns[columns.index("steps") :]}
        return {c: 1 for c in columns} | lists | {
            "pair": plan.pair, "method": name, "k": k, "seed": seed, "rate": rate, "steps": steps,
            "early": steps[-1],
        }  # fmt: skip

    def fake_trial(subject, plan, name, rate, seed):
        done.append((name, rate, seed))
        return {"pair": plan.pair, "method": name, "rate": rate, "seed": seed, "steps": [2],
                "heldout": [rate], "best": rate}  # fmt: skip

    monkeypatch.setattr(run, "run", fake_run)
    monkeypatch.setattr(run, "trial", fake_trial)
    return done


def study(folder, plan=None, **options):
    said = []
    conduct(folder, plan or tiny.plan(), tiny.make, processes=1, say=said.append, **options)
    return said


def test_from_nothing_to_a_report_and_then_nothing_is_left(tmp_path, quick):
    said = study(tmp_path)
    assert len(quick) == 2 * 4 + 3 * 2 * 2
    assert quick[:8] == [t for t in tiny.plan().trials()] and quick[8:] == list(tiny.plan().runs())
    assert "12 of the plan's 12 runs are in" in (tmp_path / "STUDY.md").read_text()
    assert any("learning rates: full 3e-05, gelu 0.001" in line for line in said)
    quick.clear()
    study(tmp_path, stages=("tune", "run"))
    assert quick == []


def test_after_its_minutes_none_begins(tmp_path, quick, monkeypatch):
    now = iter(range(1000))
    # every look at the clock is a minute
    monkeypatch.setattr("time.monotonic", lambda: 60.0 * next(now))
    study(tmp_path, minutes=12)
    assert 2 <= len(quick) < 8
    assert "**0 of the plan's 12 runs are in**" in (tmp_path / "STUDY.md").read_text()
    study(tmp_path, minutes=500)
    assert quick == [*tiny.plan().trials(), *tiny.plan().runs()]


def test_it_goes_on_where_it_was_cut_off(tmp_path, quick, monkeypatch):
    computed = ("tune", "run")
    study(tmp_path, limit=9, stages=computed)
    assert len(quick) == 9
    table = work.results(tmp_path, tiny.plan())
    with open(table.path, "a") as stream:
        stream.write(f"{tiny.plan().digest()},bars,full,6")  # cut off while it was written
    append, real = [], work.Table.append

    def stumbling(self, line):
        append.append(line)
        if len(append) == 3:
            raise KeyboardInterrupt
        real(self, line)

    monkeypatch.setattr(work.Table, "append", stumbling)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path, stages=computed)
    assert len(table.read()) == 3
    monkeypatch.setattr(work.Table, "append", real)
    study(tmp_path, stages=computed)
    assert [table.name(line)[1:] for line in table.read()] == [
        (name, str(k), str(seed)) for name, k, seed in tiny.plan().runs()
    ]
    assert len(quick) == 8 + 12 + 1  # one was computed and not written


def test_another_plan_is_refused_before_anything_is_computed(tmp_path, quick):
    study(tmp_path, given=RATES, limit=2, stages=("run",))
    quick.clear()
    before = (tmp_path / "runs.csv").read_bytes()
    with pytest.raises(TrainingError, match="this is plan"):
        study(tmp_path, tiny.plan(batch=8), given=RATES)
    assert quick == [] and (tmp_path / "runs.csv").read_bytes() == before


def test_a_report_of_nothing_is_refused(tmp_path, quick):
    with pytest.raises(TrainingError, match="folder: expected one with a study's results, got"):
        study(tmp_path / "not-there", stages=("report",))
    assert not (tmp_path / "not-there").exists()


def test_given_rates_need_no_trials_and_stages_are_alone(tmp_path, quick):
    study(tmp_path, given=RATES, stages=("run",))
    assert quick == list(tiny.plan().runs())
    assert not (tmp_path / "STUDY.md").exists() and not (tmp_path / "tuning.csv").exists()
    elsewhere = tmp_path / "page.md"
    (tmp_path / "empty").mkdir()
    study(tmp_path / "empty", stages=("report",), report=elsewhere)
    assert "0 of the plan's 12 runs are in" in elsewhere.read_text()
