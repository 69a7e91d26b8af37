"""A run from its first step to its last: what is watched, kept and recorded, and when it stops."""

from __future__ import annotations

import math

import pytest
import torch

from a3fta_kernels.train import checkpoints, records
from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.listener import Listener
from a3fta_kernels.train.loop import train
from a3fta_kernels.train.records import EVALUATIONS, LOG
from a3fta_kernels.train.trainer import Trainer
from tests.train import setups


@pytest.fixture
def make(tmp_path, accelerators):
    def make(folder="run", **changes):
        return setups.make_run(tmp_path / folder, accelerators(), **changes)

    return make


def steps(run, name):
    return [entry["step"] for entry in records.read(run.folder, name)]


def numbers(run, name=LOG):
    """What was recorded, but for what a clock says."""
    return [entry | {"seconds": 0} for entry in records.read(run.folder, name)]


def parameters(run):
    return {
        n: p.detach().clone() for n, p in run.family.denoiser.named_parameters() if p.requires_grad
    }


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def scripted(monkeypatch, losses):
    """Evaluations whose held-out losses are given, by step."""

    def evaluate(trainer):
        loss = losses[trainer.done]
        return {
            "step": trainer.done, "bins": [[0, 1]], "train": [1.0], "heldout": [loss],
            "train_mean": 1.0, "heldout_mean": loss,
        }  # fmt: skip

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


def test_a_run_logs_every_step_and_watches_when_it_is_due(make):
    run = make(steps=5, heldout=(3,), evaluate_every=2, checkpoint_every=3, sample_every=3)
    drawn = []
    run.sampler = lambda step: drawn.append((step, run.family.denoiser.training))
    result = train(run)
    assert steps(run, LOG) == [1, 2, 3, 4, 5]
    assert steps(run, EVALUATIONS) == [0, 2, 4, 5]  # the base, and the last
    assert drawn == [(0, False), (3, False), (5, False)]
    assert checkpoints.steps(run.checkpoints) == [2, 3, 4, 5]
    assert result.step == 5 and not result.stopped_early
    assert [e["step"] for e in result.evaluations] == [0, 2, 4, 5]
    judged = {e["step"]: e["heldout_mean"] for e in result.evaluations if e["step"]}
    assert result.best == min(judged, key=judged.get)


def test_nothing_is_watched_where_nothing_is_asked(make):
    run = make(steps=2, evaluate_every=0, sample_every=0, checkpoint_every=9)
    run.sampler = pytest.fail
    result = train(run)
    assert result.evaluations == [] and result.best is None
    assert not (run.folder / EVALUATIONS).exists()
    assert checkpoints.steps(run.checkpoints) == [2]  # the last


def test_training_lowers_the_loss(make):
    run = make(steps=40, batch=4, rank=8, learning_rate=0.1, evaluate_every=40, checkpoint_every=99)
    before, after = train(run).evaluations
    assert all(b < 0.95 * a for a, b in zip(before["train"], after["train"], strict=True))


def test_watching_changes_nothing(make):
    quiet = make("quiet", steps=4, evaluate_every=0, dropout=0.3)
    train(quiet)
    watched = make(
        "watched", steps=4, evaluate_every=1, sample_every=1, dropout=0.3, checkpoint_every=1
    )
    watched.sampler = lambda step: torch.rand(7)
    train(watched)
    assert numbers(watched) == numbers(quiet)
    assert equal(parameters(watched), parameters(quiet))


@pytest.mark.parametrize(
    ("losses", "patience", "last", "best", "early"),
    [
        ([9, 3, 2, 4, 5, 1, 1], 2, 4, 2, True),
        ([9, 3, 2, 4, 1, 5, 5], 2, 6, 4, True),
        ([9, 3, 2, 4, 1, 5, 5], 3, 6, 4, False),
        ([0, 3, 2, 4, 1, 5, 5], 0, 6, 4, False),
        ([9, 3, 3, 3, 3, 3, 3], 1, 2, 1, True),
        ([9, 3, None, 2, None, None, 1], 2, 5, 3, True),  # diverged, and back, and diverged
        ([9, None, None, None, None, None, None], 1, 6, None, False),
    ],
)
def test_patience_ends_a_run(make, monkeypatch, losses, patience, last, best, early):
    scripted(monkeypatch, losses)
    run = make(steps=6, heldout=(3,), evaluate_every=1, checkpoint_limit=1, patience=patience)
    result = train(run)
    assert (result.step, result.best, result.stopped_early) == (last, best, early)
    assert steps(run, LOG) == list(range(1, last + 1))
    # the newest, and the best
    assert checkpoints.steps(run.checkpoints) == sorted({last, best} - {None})


def test_a_run_that_stopped_early_stays_so(make, monkeypatch):
    scripted(monkeypatch, [9, 1, 2, 3, 4])
    run = make(heldout=(3,), evaluate_every=1, patience=2)
    first = train(run)
    before = numbers(run)
    run = make(heldout=(3,), evaluate_every=1, patience=2)
    again = train(run)
    assert again == first
    assert again.stopped_early and again.step == 3 and numbers(run) == before


def test_more_patience_goes_on(make, monkeypatch):
    scripted(monkeypatch, [9, 1, 2, 3, 0.5])
    train(make(heldout=(3,), evaluate_every=1, patience=1))
    result = train(make(heldout=(3,), evaluate_every=1, patience=3))
    assert (result.step, result.best, result.stopped_early) == (4, 4, False)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_newest_checkpoints_stay_beside_the_best(make, monkeypatch, limit):
    scripted(monkeypatch, [9, 3, 1, 4, 5, 6, 7])
    run = make(steps=6, heldout=(3,), evaluate_every=1, checkpoint_limit=limit)
    assert train(run).best == 2
    assert checkpoints.steps(run.checkpoints) == [2, *range(7 - limit, 7)]


def test_a_run_goes_on_where_its_checkpoint_is(make):
    unbroken = make("unbroken", steps=5, heldout=(3,), ema=0.9, dropout=0.2)
    expected = train(unbroken)
    run = make(steps=5, heldout=(3,), ema=0.9, dropout=0.2)
    train(run)
    # as after a kill: records of steps whose checkpoint is not there
    for step in (4, 5):
        (checkpoints.place(run.checkpoints, step) / "training.pt").write_bytes(b"")
    with open(run.folder / LOG, "a") as stream:
        stream.write('{"step": 6, "lo')
    told = []
    run = make(steps=5, heldout=(3,), ema=0.9, dropout=0.2)
    run.listener = type("Told", (Listener,), {"say": lambda self, text: told.append(text)})()
    result = train(run)
    assert told == ["run: goes on after step 3"]
    assert result.best == expected.best
    assert numbers(run) == numbers(unbroken)
    assert numbers(run, EVALUATIONS) == numbers(unbroken, EVALUATIONS)
    assert equal(parameters(run), parameters(unbroken))


def test_records_without_a_checkpoint_begin_again(make):
    run = make(steps=2)
    run.folder.mkdir()
    records.append(run.folder, LOG, {"step": 1, "loss": 0.0})
    records.append(run.folder, EVALUATIONS, {"step": 0})
    train(run)
    assert steps(run, LOG) == [1, 2] and steps(run, EVALUATIONS) == [0, 2]
    assert all(entry["loss"] > 0 for entry in records.read(run.folder, LOG))


def test_a_loss_that_is_none_leaves_what_was_saved(make):
    unbroken = make("unbroken", steps=4)
    train(unbroken)
    run = make(steps=4)
    predict, calls = run.family.predict, []

    def failing(model, noisy, time, row):
        calls.append(model.training)
        found = predict(model, noisy, time, row)
        return found * math.nan if sum(calls) == 4 else found

    run.family.predict = failing
    with pytest.raises(
        TrainingError, match=r"step 4: the loss is nan .*checkpoint of step 3 is whole"
    ):
        train(run)
    assert steps(run, LOG) == [1, 2, 3]
    assert checkpoints.steps(run.checkpoints) == [1, 2, 3]
    # mended, it goes on as if nothing had been
    run = make(steps=4)
    train(run)
    assert numbers(run) == numbers(unbroken)


def test_the_last_step_may_be_another(make):
    run = make(steps=9, evaluate_every=4, schedule="cosine")
    run.stop = 3
    heard = []

    class Heard(Listener):
        def begin(self, title, step, steps):
            heard.append((title, step, steps))

        def step(self, entry):
            heard.append(entry["step"])

    run.listener = Heard()
    assert train(run).step == 3
    assert heard == [("run", 0, 3), 1, 2, 3]
    assert steps(run, EVALUATIONS) == [0, 3]
    # the rate is that of a run of nine
    assert records.read(run.folder, LOG)[2]["lr"] == pytest.approx(
        0.005 * (1 + math.cos(2 * math.pi / 9))
    )


def test_what_fails_while_training_gives_the_model_back(make):
    run = make()
    run.family.noise.draw = None
    with pytest.raises(TypeError):
        train(run)
    assert run.accelerator._models == []


def test_before_samples_are_drawn_recordings_are_forgotten(make, monkeypatch):
    run = make(steps=2, sample_every=1)
    did = []
    monkeypatch.setattr(Trainer, "forget_recordings", lambda trainer: did.append("forgotten"))
    run.sampler = lambda step: did.append(step)
    train(run)
    assert did == ["forgotten", 0, "forgotten", 1, "forgotten", 2]


def test_a_run_is_told_of_before_its_first_evaluation(make, monkeypatch):
    """Which may take minutes."""
    told = []

    class Told(Listener):
        def begin(self, title, step, steps):
            told.append("begun")

    run = make(steps=1, heldout=(3,), evaluate_every=1)
    run.listener = Told()
    evaluate = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda trainer: [told.append("evaluated"), evaluate(trainer)][1]
    )
    train(run)
    assert told == ["begun", "evaluated", "evaluated"]
