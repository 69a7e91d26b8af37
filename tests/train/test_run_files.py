"""Run folders as they are found: whole, cut short, damaged."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from a3fta_kernels.train.run_files import (
    Run,
    is_copy,
    prompts,
    thumbnail,
)

from .runs import lines, run_folder


def test_a_line_cut_short_ends_the_file(tmp_path):
    path = tmp_path / "log.jsonl"
    for rest in ('{"st', '{"st\n{"step": 3}\n'):
        path.write_text('{"step": 1}\n{"step": 2}\n' + rest)
        assert Run(tmp_path).log == [{"step": 1}, {"step": 2}]
    assert Run(tmp_path / "none").log == []


def test_an_empty_or_damaged_folder_is_empty(tmp_path):
    for run in (Run(tmp_path), Run(tmp_path / "none")):
        assert run.settings == run.summary == {}
        assert run.photos == {"used": [], "skipped": []}
        assert run.heldout is run.chosen is run.sample_row() is None
        assert run.last_step == 0 and run.binned == run.folds == []
    (tmp_path / "settings.yaml").write_text("a: [1")
    (tmp_path / "summary.json").write_text("[1, 2")
    (tmp_path / "photos.json").write_text('{"used": []')
    damaged = Run(tmp_path)
    assert damaged.settings == damaged.summary == {} and damaged.photos["used"] == []


def test_folds_weigh_by_their_photos_at_the_steps_they_share(tmp_path):
    for fold, (steps, value) in enumerate([([0, 10, 20], 1.0), ([0, 10], 4.0)]):
        rows = [
            {"step": s, "bins": [[0, 0.5], [0.5, 1]], "train": [1.0, 2.0],
             "heldout": [value, value + s], "heldout_mean": value + s / 2}
            for s in steps
        ]  # fmt: skip
        lines(tmp_path / "folds" / str(fold) / "evaluations.jsonl", rows)
    used = [{"name": str(i), "fold": int(i == 0)} for i in range(3)]  # two photos in 0, one in 1
    (tmp_path / "photos.json").write_text(json.dumps({"used": used, "skipped": []}))
    run = Run(tmp_path)
    assert run.heldout.steps == [0, 10]
    assert run.heldout.values == pytest.approx([(2 * 1 + 4) / 3, (2 * 6 + 9) / 3])
    assert [row["step"] for row in run.binned] == [0, 10]
    assert run.binned[1]["heldout"] == pytest.approx([2.0, (2 * 11 + 14) / 3])
    assert run.binned[1]["train"] == pytest.approx([1.0, 2.0])


def test_the_summary_and_the_folders_of_folds_agree(tmp_path):
    folder = run_folder(tmp_path, folds=3, heldout=0)
    told = Run(folder).heldout
    (folder / "summary.json").unlink()
    assert Run(folder).heldout.values == pytest.approx(told.values)
    assert len(Run(folder).folds) == 3


def test_a_loss_that_was_not_a_number_is_left_out(tmp_path):
    rows = [{"step": s, "train_mean": v} for s, v in [(0, 0.5), (1, None), (2, 0.25)]]
    lines(tmp_path / "evaluations.jsonl", rows)
    curve = Run(tmp_path).mean_of("train_mean")
    assert curve.steps == [0, 2] and curve.values == [0.5, 0.25]
    assert curve.best() == 2 and curve.at(1) is None
    bad = {"step": 0, "bins": [[0, 1]], "train": [None], "heldout": [1.0]}
    lines(tmp_path / "folds" / "0" / "evaluations.jsonl", [bad])
    assert math.isnan(Run(tmp_path).binned[0]["train"][0])


@pytest.mark.parametrize(("chosen", "step"), [(300, 200), (400, 400), (100, 200), (None, 600)])
def test_the_samples_of_the_chosen_step_or_near_it(tmp_path, chosen, step):
    folder = run_folder(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "chosen_step": chosen}))
    assert Run(folder).sample_row()["step"] == step


def test_rows_of_samples():
    row = {"files": ["a", "b", "c"], "prompts": ["x", None], "distance": [0.1, 0.5],
           "threshold": 0.3, "copies": 1 / 3}  # fmt: skip
    assert prompts(row) == ["x", "", ""]
    assert [is_copy(row, i) for i in range(3)] == [True, False, False]
    assert not is_copy({**row, "copies": None}, 0)  # where it could not be told
    assert prompts({"files": ["a"], "prompts": None}) == [""]


def test_thumbnails(tmp_path):
    Image.new("RGB", (400, 200), "red").save(tmp_path / "a.jpg")
    assert thumbnail(tmp_path / "a.jpg", 50).size == (50, 25)
    Image.new("RGBA", (4, 8)).save(tmp_path / "b.png")
    assert thumbnail(tmp_path / "b.png", 50).mode == "RGB"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "c.jpg", exif=turned)
    assert thumbnail(tmp_path / "c.jpg", 50).size == (20, 40)
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:100])
    (tmp_path / "e.png").write_text("no image")
    for path in (tmp_path / "d.jpg", tmp_path / "e.png", tmp_path / "none.png", tmp_path, None):
        assert thumbnail(path, 50) is None
