"""finetune at its edges: what is told before a run is there, and what is never made."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch

from a3fta_kernels.train import (
    TrainingError,
    checkpoints,
    families,
    finetune,
    recipe,
    records,
)
from a3fta_kernels.train.trainer import Trainer
from tests.train import runs_on_disk as runs


@pytest.fixture
def settings(tmp_path, accelerators, pipelines):
    """Of three photos, without held-out ones or samples; the process's accelerate starts anew."""
    accelerators()
    runs.write_photos(tmp_path, 3)

    def settings(**changes):
        plain = {"model": pipelines("unet"), "steps": 2, "heldout": "none", "sample_every": 0}
        return runs.settings(tmp_path, **(plain | changes))

    return settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"targets": ("attn7",)}, "targets: "),
        ({"lean": "auto", "budget": "1KiB"}, "budget: expected at least"),
        ({"lean": "auto", "budget": "much"}, "budget: expected a size"),
        ({"log_with": ("paper",)}, "log_with: expected one of those installed"),
        ({"optimizer": "sgd"}, "optimizer: "),
        ({"cuda_graph": True}, "cuda_graph: expected one process and its GPU, got 1 on cpu"),
    ],
)
def test_what_cannot_be_leaves_no_run(settings, changes, told):
    with pytest.raises(TrainingError, match=told):
        finetune(settings(**changes))
    assert finetune(settings()).is_dir()  # mended, and not resumed


def test_a_missing_prior_prompt_leaves_no_run(settings, pipelines):
    options = {"model": pipelines("sd"), "resolution": 32, "trigger": "a dog"}
    with pytest.raises(TrainingError, match="prior_prompt: expected a caption"):
        finetune(settings(prior_weight=1.0, **options))
    assert finetune(settings(prior_weight=1.0, prior_prompt="a dog", **options)).is_dir()


def test_missing_features_are_told_before_folds(settings, tmp_path):
    with pytest.raises(TrainingError, match="nowhere"):
        finetune(settings(heldout="kfold", features="/nowhere", sample_every=1))
    assert not (tmp_path / "run" / "folds").exists()


def test_folds_that_nobody_judges_are_not_trained(settings, tmp_path):
    finetune(settings(heldout="auto", evaluate_every=0))
    assert not (tmp_path / "run" / "folds").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["chosen_step"] == 2 and summary["fold_curves"] == []


def test_nothing_is_held_out_that_nobody_evaluates(settings, tmp_path):
    adapter = finetune(settings(heldout="auto", evaluate_every=0))
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text())["rule"] == "none"
    used = json.loads((run / "photos.json").read_text())["used"]
    assert [(p["split"], p["fold"]) for p in used] == [("train", None)] * 3
    assert "held out in" not in (adapter / "README.md").read_text(encoding="utf-8")


def test_a_folder_of_something_else_is_left_alone(settings, tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "mine").write_text("of another")
    (run / ".notes.new").write_text("mine")
    with pytest.raises(TrainingError, match=r"output: expected a new or empty folder.* adapter"):
        finetune(settings())
    assert (run / "adapter" / "mine").exists() and (run / ".notes.new").exists()
    shutil.rmtree(run / "adapter")
    finetune(settings())
    assert (run / ".notes.new").exists()


def test_output_that_is_a_file(settings, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(TrainingError, match="output: expected a folder, got the file"):
        finetune(settings())
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["settings.yaml", "photos.json"])
@pytest.mark.parametrize("content", ["{", "[]", "unheard: 1", '{"used": 3}'])
def test_a_record_that_somebody_changed_is_named(settings, tmp_path, name, content):
    finetune(settings())
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(TrainingError, match=rf"resume: expected .*{name} as the run wrote it"):
        finetune(settings(resume=True))


def test_photos_may_have_moved(settings, tmp_path):
    finetune(settings(steps=2))
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    moved = settings(steps=4, resume=True, data=str(tmp_path / "elsewhere"))
    finetune(moved)
    assert checkpoints.steps(tmp_path / "run" / "checkpoints") == [2, 4]
    (tmp_path / "elsewhere" / "0.png").unlink()
    with pytest.raises(TrainingError, match=r"data: expected the photos .*0\.png"):
        finetune(moved)


def test_fewer_steps_than_are_done(settings, tmp_path):
    finetune(settings(steps=4, schedule="constant"))
    with pytest.raises(TrainingError, match="steps: expected at least the 4 that are done, got 3"):
        finetune(settings(steps=3, schedule="constant", resume=True))
    assert finetune(settings(steps=4, schedule="constant", resume=True)).is_dir()


def test_every_prompt_that_was_asked_for_is_drawn(settings, tmp_path, pipelines):
    options = {"model": pipelines("sd"), "resolution": 32, "trigger": "a dog", "sample_every": 2}
    finetune(settings(sample_prompts=("one", "two", "three"), sample_count=2, **options))
    rows = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompts"] for row in rows] == [["one", "two", "three"]] * 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("trigger", "a dog"), ("sample_prompts", ("a dog",)), ("caption_dropout", 0.5)],
)
def test_texts_for_a_model_without_are_refused(settings, name, value):
    with pytest.raises(TrainingError, match=f"{name}: expected none for a model without texts"):
        finetune(settings(**{name: value}))


def judging(monkeypatch, told):
    """Evaluations that say `told(step)` of the held-out photos, or nothing where it is None."""
    evaluate = Trainer.evaluate

    def judge(trainer):
        loss = told(trainer.done)
        found = [math.nan if loss is None else loss] * 2
        entry = evaluate(trainer)
        held = entry["heldout"] is not None  # the last run of folds has nothing to judge
        return entry | ({"heldout": found, "heldout_mean": loss} if held else {})

    monkeypatch.setattr(Trainer, "evaluate", judge)


@pytest.mark.parametrize("heldout", ["holdout", "kfold"])
@pytest.mark.parametrize("diverged", [{4}, {2}, {2, 4}, {0, 2, 4}])
def test_a_model_that_diverged_is_not_chosen(settings, tmp_path, monkeypatch, heldout, diverged):
    judging(monkeypatch, lambda step: None if step in diverged else 1.0 + step)
    count = 1 if heldout == "holdout" else None
    finetune(settings(steps=4, heldout=heldout, heldout_count=count, folds=2))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    whole = {2, 4} - diverged
    best = min(whole or {4})
    # of two folds, both of which trained on half of the photos
    assert summary["chosen_step"] == (min(2 * best, 4) if heldout == "kfold" else best)
    assert summary["why"].startswith("the last step") == (best == 4 and heldout == "kfold") or (
        not whole
    )


def test_a_damaged_checkpoint_is_not_made_the_adapter(settings, tmp_path, monkeypatch):
    judging(monkeypatch, lambda step: 1.0 + abs(step - 2))
    chosen = settings(steps=4, heldout="holdout", heldout_count=1)
    adapter = finetune(chosen) / "adapter_model.safetensors"
    before = adapter.read_bytes()
    place = checkpoints.place(tmp_path / "run" / "checkpoints", 2) / "adapter" / adapter.name
    assert place.read_bytes() == before
    place.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(TrainingError, match=r"step-000002 is damaged: adapter.*not what was saved"):
        finetune(replace(chosen, resume=True))
    assert adapter.read_bytes() == before


def test_a_process_has_one_precision(settings, tmp_path):
    """Of autocast's, which only fp16 asks for."""
    finetune(settings())
    with pytest.raises(TrainingError, match=r"mixed_precision fp16: .*already been initialized"):
        finetune(settings(output=str(tmp_path / "other"), mixed_precision="fp16"))
    assert not (tmp_path / "other").exists()
    finetune(settings(output=str(tmp_path / "other"), mixed_precision="bf16"))


def test_nothing_in_bf16_runs_under_autocast(settings, monkeypatch):
    """It would compute norms in fp32, and keep them for the backward."""
    loss, seen = Trainer._loss, []

    def watched(self, batch):
        self.plain.register_forward_pre_hook(
            lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
        )
        return loss(self, batch)

    monkeypatch.setattr(Trainer, "_loss", watched)
    finetune(settings(mixed_precision="bf16", steps=1))
    assert seen and not any(seen)


def test_a_run_without_memory_says_how_far_it_came_and_goes_on_with_less(
    settings, tmp_path, monkeypatch
):
    advance = Trainer.advance

    def full(self):
        if self.done == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", full)
    with pytest.raises(torch.OutOfMemoryError):
        finetune(settings(steps=4, checkpoint_every=1, lean="exact"))
    assert "2 of 4" in (tmp_path / "run" / "report.html").read_text()
    monkeypatch.setattr(Trainer, "advance", advance)
    less = {"lean": "block", "norms": "int8", "gradient_checkpointing": True}
    finetune(settings(steps=4, checkpoint_every=1, resume=True, **less))
    assert [e["step"] for e in records.read(tmp_path / "run", records.LOG)] == [1, 2, 3, 4]


def test_weights_that_cannot_fit_are_refused_before_photos_are_read(settings, monkeypatch):
    family = families.load(settings().model, torch.float32)
    chip = SimpleNamespace(total_memory=1 << 40)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    recipe._check_room(family, torch.device("cuda"))
    chip.total_memory = 1 << 10
    with pytest.raises(TrainingError, match=r"weights that fit into the 0 MiB .* got \d"):
        recipe._check_room(family, torch.device("cuda"))
    recipe._check_room(family, torch.device("cpu"))


def test_the_environment_of_a_launch_does_not_accumulate(settings, tmp_path, monkeypatch):
    finetune(settings())
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    finetune(settings(output=str(tmp_path / "launched")))
    norms = [
        [entry["grad_norm"] for entry in records.read(tmp_path / run, records.LOG)]
        for run in ("run", "launched")
    ]
    assert norms[0] == norms[1]


def test_photos_whose_names_are_no_utf8(settings, tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        shutil.move(tmp_path / "photos" / "0.png", tmp_path / "photos" / name)
    except OSError:
        pytest.skip("this disk's names are UTF-8")
    finetune(settings(sample_every=2))
    photos = json.loads((tmp_path / "run" / "photos.json").read_text(encoding="utf-8"))
    assert tmp_path / "photos" / name in [Path(photo["file"]) for photo in photos["used"]]
    assert finetune(settings(sample_every=2, resume=True)).is_dir()


def test_folds_are_patient_and_time_adds_up(settings, tmp_path, monkeypatch):
    """Folds run to the end, as they are compared where all have been; and the time of a run is
    that of all its steps, whatever process made them."""
    judging(monkeypatch, lambda step: 1.0 + step)
    asked = settings(heldout="kfold", folds=3, evaluate_every=1, patience=1, steps=4)
    finetune(asked)
    finetune(replace(asked, resume=True))
    run = tmp_path / "run"
    logs = [records.read(path, records.LOG) for path in (run, *sorted(run.glob("folds/*")))]
    assert [len(log) for log in logs] == [2, 4, 4, 4]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["folds_best"], summary["chosen_step"]) == (1, 2)
    assert summary["seconds"] == pytest.approx(sum(e["seconds"] for log in logs for e in log))


def test_another_base_under_the_same_name_is_refused(settings, tmp_path, pipelines):
    """The losses of two bases would stand in one curve."""
    base = shutil.copytree(pipelines("unet"), tmp_path / "base")
    asked = settings(model=str(base), steps=2, checkpoint_every=1)
    finetune(asked)
    before = (tmp_path / "run" / records.LOG).read_bytes()
    pipe = diffusers.DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.3)
    pipe.save_pretrained(base)
    with pytest.raises(TrainingError, match=r"resume: .*expected an adapter for this base") as told:
        finetune(replace(asked, steps=4, resume=True))
    assert "allow_other_base" not in str(told.value)
    assert (tmp_path / "run" / records.LOG).read_bytes() == before


@pytest.mark.parametrize("rule", ["none", "kfold"])
def test_fewer_steps_than_were_done_change_nothing(settings, tmp_path, rule):
    asked = settings(steps=4, heldout=rule, evaluate_every=2)
    finetune(asked)

    def kept():
        return {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}

    before = kept()
    with pytest.raises(TrainingError, match="steps: expected at least the 4 that are done, got 2"):
        finetune(replace(asked, steps=2, resume=True))
    assert kept() == before


def test_missing_features_leave_no_run(settings, tmp_path):
    asked = settings(features="/nowhere", sample_every=1)
    with pytest.raises(TrainingError, match="nowhere"):
        finetune(asked)
    assert not (tmp_path / "run" / recipe.SETTINGS).exists()
    finetune(replace(asked, features="pixels", sample_count=1, sample_steps=1))


def test_a_card_names_what_settings_left_open(settings, tmp_path):
    card = (finetune(settings(learning_rate=None)) / "README.md").read_text()
    for line in ("| learning_rate | `0.0005` |", "| resolution | `16` |"):
        assert line in card
    assert "| placement | `parallel` |" in card
