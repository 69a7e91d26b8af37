"""finetune from a folder of photos to an adapter that explains itself, and what it refuses."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import a3fta_kernels as a3fta
from a3fta_kernels.train import (
    Listener,
    TrainingError,
    checkpoints,
    closing,
    finetune,
    monitor,
    recipe,
    records,
    run_files,
)
from tests.train import runs_on_disk as runs


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures and reports have tests of their own, and take as long as these small runs."""
    if request.function is not test_a_run_leaves_what_it_says:
        monkeypatch.setattr(closing, "write_report", lambda run: None)
        monkeypatch.setattr(closing, "write_card", lambda run, adapter: None)


def setting_out(tmp_path: Path, photos: int, **changes):
    runs.write_unet(tmp_path)
    runs.write_photos(tmp_path, photos)
    return runs.settings(tmp_path, **changes)


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_leaves_what_it_says(tmp_path):
    settings = setting_out(tmp_path, 8, heldout="holdout", heldout_count=2)
    folder = finetune(settings)
    run = tmp_path / "run"
    assert folder == run / "adapter"
    found = {p.name for p in folder.iterdir()}
    assert found == {
        "adapter_model.safetensors", "adapter_config.json", "README.md", "curves.png", "samples.png"
    }  # fmt: skip
    log = records.read(run, records.LOG)
    assert [e["step"] for e in log] == [1, 2, 3, 4, 5, 6]
    evaluations = records.read(run, records.EVALUATIONS)
    assert [e["step"] for e in evaluations] == [0, 2, 4, 6]
    samples = records.read(run, records.SAMPLES)
    assert [e["step"] for e in samples] == [0, 3, 6]
    assert all((run / name).is_file() for e in samples for name in e["files"])
    summary = read_json(run / "summary.json")
    best = min(evaluations[1:], key=lambda e: e["heldout_mean"])["step"]
    assert summary["chosen_step"] == best == monitor.best_step(evaluations)
    chosen = run / "checkpoints" / f"step-{best:06d}" / "adapter" / "adapter_model.safetensors"
    assert chosen.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    photos = read_json(run / "photos.json")["used"]
    assert [p["split"] for p in photos].count("heldout") == 2

    # a user of the adapter
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    before = pipe.unet(x, t).sample
    a3fta.load_adapter(pipe, folder)
    assert not torch.equal(pipe.unet(x, t).sample, before)


@pytest.mark.parametrize(("asked", "placement"), [({}, "parallel"), ({"placement": "pre"}, "pre")])
def test_the_adapter_is_beside_attention_unless_told(asked, placement, tmp_path):
    options = {"heldout": "kfold", "folds": 2, "steps": 4, **asked}
    folder = finetune(setting_out(tmp_path, 4, sample_every=0, **options))
    assert read_json(folder / "adapter_config.json")["config"]["placement"] == placement
    assert read_json(folder.parent / "summary.json")["placement"] == placement
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([500])
    before = pipe.unet(x, t).sample
    a3fta.load_adapter(pipe, folder)
    assert not torch.equal(pipe.unet(x, t).sample, before)
    for layer in a3fta.projections(pipe.unet).values():
        assert layer.adapters["default"].config.placement == placement


def test_a_run_from_before_placements_were_told_goes_on_in_front(tmp_path):
    options = {"heldout": "none", "sample_every": 0, "schedule": "constant"}
    begun = setting_out(tmp_path, 3, steps=2, placement="pre", **options)
    finetune(begun)
    path = tmp_path / "run" / "settings.yaml"
    path.write_text(path.read_text().replace("placement: pre\n", ""))
    with pytest.raises(TrainingError, match="placement was 'pre', is 'parallel'"):
        finetune(replace(begun, steps=3, resume=True, placement=None))
    folder = finetune(replace(begun, steps=3, resume=True))
    assert read_json(folder / "adapter_config.json")["config"]["placement"] == "pre"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"heldout": "holdout", "heldout_count": 2}, "2 of them are held out"),
        ({"heldout": "kfold", "folds": 2}, "2 runs without a part of them come before the last"),
        ({"heldout": "none"}, "none is held out, so nothing will tell when it overfits"),
    ],
)
def test_what_happens_to_the_photos_is_said(tmp_path, changes, told):
    said: list[str] = []

    class Ears(Listener):
        def say(self, text):
            said.append(text)

    settings = setting_out(tmp_path, 4, steps=1, sample_every=0, **changes)
    (tmp_path / "photos" / "torn.png").write_bytes(b"no picture")
    finetune(settings, Ears())
    first = said[0].splitlines()
    assert first[0].startswith(f"4 photos, 2 sizes to train at; {told}")
    assert first[1].startswith("  left out: torn.png: ")


def test_the_held_out_photos_are_never_trained_on(tmp_path, monkeypatch):
    from a3fta_kernels.train.trainer import Trainer

    seen: set[int] = set()
    parts = Trainer._parts

    def spy(self, number, chosen):
        seen.update(chosen)
        return parts(self, number, chosen)

    monkeypatch.setattr(Trainer, "_parts", spy)
    settings = setting_out(tmp_path, 8, heldout="holdout", heldout_count=2, steps=12)
    finetune(settings)
    held = {
        i for i, p in enumerate(read_json(tmp_path / "run/photos.json")["used"])
        if p["split"] == "heldout"
    }  # fmt: skip
    assert len(held) == 2 and seen == set(range(8)) - held


def test_folds_decide_how_long_the_last_run_is(tmp_path, monkeypatch):
    from a3fta_kernels.train.trainer import Trainer

    evaluate = Trainer.evaluate

    def overfitting(self):
        """Held-out losses that rise from step 4 on."""
        entry = evaluate(self)
        if entry["heldout"] is not None:
            entry["heldout"] = [x + abs(entry["step"] - 4) for x in entry["heldout"]]
            entry["heldout_mean"] = monitor.mean(entry["heldout"])
        return entry

    monkeypatch.setattr(Trainer, "evaluate", overfitting)
    settings = setting_out(tmp_path, 5, heldout="kfold", folds=2, steps=12, sample_every=0)
    finetune(settings)
    run = tmp_path / "run"
    summary, photos = read_json(run / "summary.json"), read_json(run / "photos.json")["used"]
    sizes = [sum(p["fold"] == f for p in photos) for f in (1, 2)]
    curves = [records.read(run / "folds" / f, records.EVALUATIONS) for f in ("1", "2")]
    assert sorted(sizes) == [2, 3] and [len(c) for c in curves] == [7, 7]
    means = {
        at[0]["step"]: sum(n * e["heldout_mean"] for n, e in zip(sizes, at, strict=True)) / 5
        for at in zip(*curves, strict=True)
    }
    best = min((step for step in means if step), key=lambda step: means[step])
    assert summary["folds_best"] == best == 4
    # all five are seen as often as the folds saw their half
    assert summary["chosen_step"] == summary["steps_done"] == 8
    why = "as many passes over all photos as the folds made over theirs by step 4, which has"
    assert summary["why"].startswith(why)
    # and the report judges by the same mean
    curve = run_files.Run(run).heldout
    assert curve.steps == list(means) and curve.values == pytest.approx(list(means.values()))
    assert summary["rule"] == "kfold" and [c["fold"] for c in summary["fold_curves"]] == [1, 2]
    # it trained on all photos, and each fold on the others
    assert records.read(run, records.EVALUATIONS)[-1]["heldout"] is None
    assert checkpoints.steps(run / "checkpoints")[-1] == 8


def test_patience_ends_a_run(tmp_path):
    settings = setting_out(
        tmp_path, 6, heldout="holdout", heldout_count=2, learning_rate=0.5, schedule="constant",
        steps=40, patience=2, sample_every=0, checkpoint_limit=1,
    )  # fmt: skip
    finetune(settings)
    summary = read_json(tmp_path / "run" / "summary.json")
    evaluations = records.read(tmp_path / "run", records.EVALUATIONS)
    assert summary["stopped_early"] and summary["steps_done"] < 40
    assert summary["steps_done"] == evaluations[-1]["step"] == summary["chosen_step"] + 4
    # the best stays although only one newest checkpoint is kept
    kept = checkpoints.steps(tmp_path / "run" / "checkpoints")
    assert kept == sorted({summary["chosen_step"], summary["steps_done"]})


def test_the_last_adapter_where_that_is_asked_for(tmp_path):
    settings = setting_out(
        tmp_path, 6, heldout="holdout", heldout_count=2, learning_rate=0.5, choose="last"
    )
    finetune(settings)
    assert read_json(tmp_path / "run" / "summary.json")["chosen_step"] == 6


def test_a_budget_chooses_the_levels(tmp_path):
    said: list[str] = []

    class Ears(Listener):
        def say(self, text):
            said.append(text)

    settings = setting_out(
        tmp_path, 3, heldout="none", sample_every=0, lean="auto", budget="10MiB", steps=2
    )
    finetune(settings, Ears())
    assert any(text.startswith("lean 'auto'") for text in said)
    refused = replace(settings, output=str(tmp_path / "other"), budget="1KiB")
    with pytest.raises(TrainingError, match="budget"):
        finetune(refused)


def test_the_prior_holds_the_adapter_back(tmp_path):
    """With all weight on the prior the adapter hardly moves from doing nothing."""
    settings = setting_out(tmp_path, 4, heldout="none", sample_every=0, steps=10, evaluate_every=0)
    finetune(settings)
    finetune(replace(settings, output=str(tmp_path / "held"), prior_weight=100.0))

    def moved(run: str) -> float:
        pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
        x, t = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 300
        with torch.no_grad():
            before = pipe.unet(x, t).sample
            a3fta.load_adapter(pipe, tmp_path / run / "adapter")
            return float((pipe.unet(x, t).sample - before).norm())

    assert moved("held") < 0.7 * moved("run")


def test_images_of_their_own_for_the_prior(tmp_path):
    settings = setting_out(tmp_path, 3, heldout="none", sample_every=0, steps=2)
    (tmp_path / "more").mkdir()
    runs.write_photos(tmp_path / "more", 2, seed=1)
    (tmp_path / "more" / "photos" / "torn.png").write_bytes(b"no picture")
    other = replace(settings, prior_weight=1.0, prior_data=str(tmp_path / "more" / "photos"))
    said: list[str] = []

    class Ears(Listener):
        def say(self, text):
            said.append(text)

    finetune(other, Ears())
    (prior,) = (text for text in said if text.startswith("2 images for the prior"))
    assert "left out: torn.png" in prior
    assert len(records.read(tmp_path / "run", records.LOG)) == 2


@pytest.mark.parametrize("name", ["tensorboard"])
def test_trackers_are_told(tmp_path, name):
    pytest.importorskip(name)
    finetune(setting_out(tmp_path, 3, heldout="none", sample_every=0, log_with=(name,)))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_a_linear_adapter_becomes_a_lora(tmp_path):
    settings = setting_out(
        tmp_path, 3, heldout="none", sample_every=0, activation="identity", bias=False
    )
    folder = finetune(settings)
    pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    a3fta.load_adapter(pipe, folder)
    lora = load_file(a3fta.export_lora(pipe, tmp_path / "lora"))
    assert {name.rsplit(".", 2)[1] for name in lora} == {"lora_A", "lora_B"}
    assert any(value.abs().max() > 0 for name, value in lora.items() if ".lora_B." in name)


def test_the_hub_gets_the_adapter(tmp_path, monkeypatch):
    import huggingface_hub

    sent = []
    api = huggingface_hub.HfApi
    monkeypatch.setattr(api, "create_repo", lambda self, name, exist_ok: sent.append(name))
    monkeypatch.setattr(
        api, "upload_folder",
        lambda self, repo_id, folder_path: sent.append({p.name for p in folder_path.iterdir()}),
    )  # fmt: skip
    settings = setting_out(
        tmp_path, 3, heldout="none", sample_every=0, steps=2, push_to_hub="somebody/dog"
    )
    finetune(settings)
    assert sent[0] == "somebody/dog" and "adapter_model.safetensors" in sent[1]

    def refuses(self, repo_id, folder_path):
        raise ConnectionError("no network")

    monkeypatch.setattr(api, "upload_folder", refuses)
    with pytest.raises(TrainingError, match=r"push_to_hub: somebody/dog .* lies in .*no network"):
        finetune(replace(settings, resume=True))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    settings = setting_out(
        tmp_path, 3, heldout="none", sample_every=0, learning_rate=1e18, max_grad_norm=0.0,
        schedule="constant", steps=50,
    )  # fmt: skip
    told: list[Path] = []
    monkeypatch.setattr(recipe, "write_report", told.append)
    with pytest.raises(TrainingError, match=r"step \d+: the \w+ is (nan|inf).*photos .*\.png"):
        finetune(settings)
    assert told == [tmp_path / "run"]
    for step in checkpoints.steps(tmp_path / "run" / "checkpoints"):
        checkpoints.check(checkpoints.place(tmp_path / "run" / "checkpoints", step))


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    import builtins

    settings = setting_out(tmp_path, 3, heldout="none", sample_every=0)
    write_bytes = Path.write_bytes

    def full(self, data):
        if self.name == "training.pt" and "step-000004" in str(self):
            with builtins.open(self, "wb") as stream:
                stream.write(bytes(data)[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(TrainingError, match=r"cannot be written: No space left.*--resume"):
        finetune(settings)
    folder = tmp_path / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step-000002"]
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    finetune(replace(settings, resume=True))
    finetune(replace(settings, output=str(tmp_path / "whole")))
    one, two = (
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
        for run in ("run", "whole")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "nowhere/at/all"}, "model: nowhere/at/all"),
        ({"optimizer": "sgd"}, "optimizer: expected one of adamw"),
        ({"targets": ("attn7",)}, "targets: expected parts of the names"),
        ({"snr_gamma": 5.0, "data": "no-such-folder"}, "no-such-folder"),
        ({"output": "photos/run"}, "output: expected a folder outside of data"),
        ({"resolution": 15}, "resolution: expected a multiple of 2"),
        ({"features": "no-model"}, "no-model"),
        ({"rank_pattern": ("nothing=3",)}, "rank_pattern"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, changes, told):
    if "output" in changes:
        changes = {"output": str(tmp_path / changes["output"])}
    settings = setting_out(tmp_path, 3, heldout="none", **changes)
    with pytest.raises(TrainingError, match=told):
        finetune(settings)
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_folder_that_is_no_pipeline(tmp_path):
    settings = setting_out(tmp_path, 3)
    (tmp_path / "pipeline" / "model_index.json").unlink()
    with pytest.raises(TrainingError, match=r"without a model_index\.json"):
        finetune(settings)


def test_a_pipeline_of_no_known_family(tmp_path):
    settings = setting_out(tmp_path, 3)
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(TrainingError, match=r"model: expected one of .*DDPMPipeline.* WanPipeline"):
        finetune(settings)
