"""The verdict's sentences against numbers recomputed here."""

from __future__ import annotations

import json

import pytest

from a3fta_kernels.train.run_files import Curve, Run
from a3fta_kernels.train.verdict import change, overfits_from, verdict, worst_bin

from .runs import lines, run_folder


def said(folder) -> str:
    return " ".join(verdict(Run(folder)))


def rows(folder):
    text = (folder / "evaluations.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, text)}


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.1f} %"


def test_the_numbers_are_those_of_the_files(tmp_path):
    folder = run_folder(tmp_path, heldout=5, photos=20)
    at, text = rows(folder), said(folder)
    best = min(at, key=lambda step: at[step]["heldout_mean"])
    assert best == 300
    low, start, end = (at[step]["heldout_mean"] for step in (300, 0, 600))
    assert (
        f"Chosen: step 300 of 600, by the held-out loss of 5 photos: {low:.4g}, "
        f"{percent(1 - low / start)} below the start ({start:.4g})." in text
    )
    since = next(
        step for step in sorted(at) if step > 300 and at[step]["heldout_mean"] > 1.01 * low
    )
    fall = 1 - at[600]["train_mean"] / at[300]["train_mean"]
    assert (
        f"From step {since} on it overfits: the held-out loss is lowest at step 300 ({low:.4g}) "
        f"and {percent(end / low - 1)} higher at step 600, while the loss of the training photos "
        f"falls by {percent(fall)}." in text
    )
    rises = [b / a - 1 for a, b in zip(at[300]["heldout"], at[600]["heldout"], strict=True)]
    assert max(rises) == rises[1]
    assert f"noise levels 0.2 to 0.4 (0 is the photo, 1 is noise): {percent(rises[1])}" in text
    assert worst_bin(Run(folder), 300, 600) == ([0.2, 0.4], pytest.approx(rises[1]))
    assert "weak witness" not in text


def test_samples_are_counted_at_the_chosen_step(tmp_path):
    text = said(run_folder(tmp_path, best=400, prompts=("a", "b", "c", "d")))
    # distances at 400 of 600: 0.23, 0.43, 0.63, 0.83; at 600 -0.1 (0.01), 0.1, 0.3, 0.5
    assert "Of 4 samples at step 400, 1 is a near-copy of a training photo (25 %)." in text
    assert "By step 600 that share grows to 75 %." in text
    assert "The samples reach 33 % of the training photos." in text


def test_few_photos_held_out_are_called_so(tmp_path):
    assert "3 photos held out are a weak witness" in said(run_folder(tmp_path / "a", heldout=3))
    assert "1 photo held out is a weak witness" in said(run_folder(tmp_path / "b", heldout=1))


def test_nothing_held_out_claims_nothing(tmp_path):
    folder = run_folder(tmp_path, heldout=0)
    text = said(folder)
    assert "Chosen: step 600 of 600." in text
    assert "Nothing was held out, so no loss here tells when it overfits" in text
    assert "on it overfits" not in text and "below the start" not in text
    at = rows(folder)
    assert f"from {at[0]['train_mean']:.4g} at step 0 to {at[600]['train_mean']:.4g}" in text


def test_folds_judge_together(tmp_path):
    folder = run_folder(tmp_path, heldout=0, folds=4)
    text = said(folder)
    folds = json.loads((folder / "summary.json").read_text())["fold_curves"]
    mean = sum(fold["heldout_mean"][3] for fold in folds) / 4
    assert f"by the mean held-out loss of 4 folds: {mean:.4g}" in text
    assert "Every fold by itself is best at step 300." in text
    assert "From step 400 on it overfits" in text and "noise levels 0.2 to 0.4" in text


def test_leave_one_out_is_named(tmp_path):
    folder = run_folder(tmp_path, heldout=0, folds=8)
    summary = json.loads((folder / "summary.json").read_text())
    summary["rule"] = "leave-one-out"
    summary["fold_curves"][2]["heldout_mean"][1] = 0.0
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "8 folds that leave one photo out each" in said(folder)
    assert "Folds by themselves are best between step 100 and 300." in said(folder)


def test_a_falling_loss_and_a_plateau(tmp_path):
    falling = run_folder(tmp_path / "a", best=600)
    assert "No sign of overfitting" in said(falling) and "More steps may help" in said(falling)
    flat = run_folder(tmp_path / "b", steps=340, best=300, every=20)
    at = rows(flat)
    rise = at[340]["heldout_mean"] / at[300]["heldout_mean"] - 1
    assert 0 < rise < 0.01
    assert "No clear overfitting" in said(flat) and f"ends {percent(rise)} above" in said(flat)


def test_a_run_that_only_got_worse(tmp_path):
    folder = run_folder(tmp_path)
    table = [{"step": s, "train_mean": 1.0, "heldout_mean": 1.0 + s / 100} for s in (0, 100, 200)]
    lines(folder / "evaluations.jsonl", table)
    (folder / "summary.json").write_text(json.dumps({"chosen_step": 100, "steps_done": 200}))
    assert "100 % above the start (1)" in said(folder)
    assert "no step is better than the untouched base" in said(folder)


def test_folds_speak_for_a_later_step(tmp_path):
    folder = run_folder(tmp_path, heldout=0, folds=3)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"folds_best": 300, "chosen_step": 450}
    (folder / "summary.json").write_text(json.dumps(summary))
    loss = Run(folder).heldout.at(300)
    assert (
        "Chosen: step 450 of 600, as many passes over all photos as the folds made over theirs by "
        f"step 300, by the mean held-out loss of 3 folds there: {loss:.4g}, " in said(folder)
    )
    since = overfits_from(Run(folder).heldout)
    assert f"From step {since} on the folds overfit:" in said(folder)
    # fewer steps than that many passes
    (folder / "summary.json").write_text(json.dumps(summary | {"chosen_step": 400}))
    assert "Chosen: step 400 of 600, the last; 450 would be as many passes over" in said(folder)
    # who asks for the last step gets its own loss
    last = run_folder(tmp_path / "last", heldout=0, folds=3, settings={"choose": "last"})
    (last / "summary.json").write_text(json.dumps(summary | {"chosen_step": 600}))
    loss = Run(last).heldout.at(600)
    assert "Chosen: step 600 of 600, the last one, as asked for" in said(last)
    assert f"there: {loss:.4g}" in said(last)


def test_unfinished_runs(tmp_path):
    text = said(run_folder(tmp_path / "a", steps=3, samples_every=0, finished=False))
    assert "has not finished: step 3 of 3 is the last one on record" in text
    assert "One evaluation says nothing" in text
    (tmp_path / "b").mkdir()
    assert said(tmp_path / "b") == "This run has recorded no step yet."


def test_early_stops_and_warnings_and_the_last_on_request(tmp_path):
    folder = run_folder(tmp_path, settings={"steps": 5000, "choose": "last"})
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"stopped_early": True, "warnings": ["xformers is missing"], "chosen_step": 600}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = said(folder)
    assert "Chosen: step 600 of 600, the last one, as asked for" in text
    assert "It stopped early, after 600 of the 5,000 steps asked for." in text
    assert text.endswith("Warning: xformers is missing")


def test_overfitting_begins_where_the_loss_stays_up():
    steps = [0, 1, 2, 3, 4, 5]
    assert overfits_from(Curve(None, steps, [2, 1, 1.5, 1.005, 1.02, 1.3])) == 4
    assert overfits_from(Curve(None, steps, [2, 1, 1.5, 1.5, 1.5, 1.009])) is None
    assert overfits_from(Curve(None, steps, [1, 2, 3, 4, 5, 6])) == 1


def test_changes_in_words():
    assert change(0.9, 1.0) == "10 % below" and change(1.05, 1.0) == "5.0 % above"
    assert change(1.0, 1.0) == "the same as" and change(1.0, 0.0) == "the same as"
