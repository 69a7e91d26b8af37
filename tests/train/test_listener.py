"""What a run tells while it goes, what it tries before it begins, and what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from a3fta_kernels.train import Listener, closing, finetune, records
from a3fta_kernels.train.listener import Share
from tests.train import runs_on_disk as runs


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures and reports have tests of their own."""
    monkeypatch.setattr(closing, "write_report", lambda run: None)
    monkeypatch.setattr(closing, "write_card", lambda run, adapter: None)


def setting_out(tmp_path, photos, **changes):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, photos)
    return runs.settings(tmp_path, **changes)


class Ears(Listener):
    def __init__(self):
        self.heard: list[tuple[str, int, int]] = []

    def work(self, what, done, of):
        self.heard.append((what, done, of))


def test_a_share_ends_at_its_end():
    """Of several processes the first may have more than its part of the whole."""
    ears = Ears()
    share = Share(ears, "evaluation", 5)
    for _ in range(3):
        share.more(2)
    assert ears.heard == [("evaluation", 2, 5), ("evaluation", 4, 5), ("evaluation", 5, 5)]


@pytest.mark.parametrize("folds", [True, False])
def test_what_cannot_be_drawn_is_told_before_the_folds(tmp_path, monkeypatch, folds):
    from a3fta_kernels.train.families import Unconditional

    def full(*told, **more):
        raise torch.OutOfMemoryError("no room")

    rule = {"heldout": "kfold", "folds": 2} if folds else {"heldout": "none"}
    settings = setting_out(tmp_path, 5, **rule)
    monkeypatch.setattr(Unconditional, "draw", full)
    with pytest.raises(torch.OutOfMemoryError):
        finetune(settings)
    assert not (tmp_path / "run" / "folds").exists()
    assert not records.read(tmp_path / "run", records.LOG)


def test_a_trial_drawing_leaves_nothing(tmp_path):
    """Nor does it change what is trained."""
    settings = setting_out(tmp_path, 5, heldout="kfold", folds=2)
    finetune(settings)
    assert records.read(tmp_path / "run", records.SAMPLES)[0]["step"] == 0
    finetune(replace(settings, output=str(tmp_path / "other"), sample_every=0))
    for fold in ("folds/1", "."):
        ours, others = (
            [e["loss"] for e in records.read(tmp_path / run / fold, records.LOG)]
            for run in ("run", "other")
        )
        assert ours == others and ours


def test_what_takes_its_time_is_told_of(tmp_path):
    ears = Ears()
    settings = setting_out(
        tmp_path, 5, heldout="kfold", folds=2, steps=1, bins=2, draws=3, sample_every=1,
        sample_count=2, batch=1, flip=True,
    )  # fmt: skip
    finetune(settings, ears)
    parts = {what: [] for what, *_ in ears.heard}
    for what, done, of in ears.heard:
        parts[what].append((done, of))
    assert list(parts) == ["photos", "samples", "evaluation"]
    assert parts["photos"] == [(i, 10) for i in range(1, 11)]
    # one for a trial, and two at steps 0 and 1
    assert parts["samples"] == [(1, 1), (1, 2), (2, 2), (1, 2), (2, 2)]
    # of folds the photos left out alone, in the last run those that train; each at steps 0 and 1
    ends = [of for done, of in parts["evaluation"] if done == of]
    assert sorted(ends) == [2 * 6, 2 * 6, 3 * 6, 3 * 6, 5 * 6, 5 * 6]
    assert all(0 < done <= of for done, of in parts["evaluation"])


def test_a_fold_is_judged_by_what_it_left_out_alone(tmp_path):
    settings = setting_out(tmp_path, 5, heldout="kfold", folds=2, sample_every=0)
    finetune(settings)
    for fold in ("folds/1", "folds/2"):
        rows = records.read(tmp_path / "run" / fold, records.EVALUATIONS)
        assert all(row["train"] is None and row["train_mean"] is None for row in rows)
        assert all(row["heldout_mean"] > 0 for row in rows)
    last = records.read(tmp_path / "run", records.EVALUATIONS)
    assert all(row["train_mean"] > 0 and row["heldout"] is None for row in last)
