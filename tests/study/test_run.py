from __future__ import annotations

import dataclasses
import math

import pytest
from PIL import Image

from a3fta_kernels.study import metrics, run
from a3fta_kernels.study.views import parse
from tests.study.tiny import SIDE, plan


@pytest.fixture(scope="module")
def line(subject, tmp_path_factory):
    sheet = tmp_path_factory.mktemp("sheets") / "new" / "gelu.png"
    return run.run(subject, plan(), "gelu", 6, 0, 1e-2, sheet), sheet


def test_a_line_has_all_columns_and_a_value_per_checkpoint(line):
    found, _ = line
    assert set(found) == set(run.columns(plan())) - {"plan"}
    for name in ("train", "heldout", "source", "train_bin1", "heldout_bin2"):
        assert len(found[name]) == 2 and all(map(math.isfinite, found[name]))
    for name in metrics.NAMES:
        assert len(found[name]) == len(found[f"{name}_2"]) == 2
    assert found["steps"] == [2, 4] and found["early"] in (2, 4)
    assert found["fold_steps"] and len(found["fold_losses"]) == len(found["fold_steps"])
    assert found["parameters"] > 0 and found["saved_bytes"] > 0 and found["step_ms"] > 0
    assert found["peak_bytes"] >= found["saved_bytes"]


def test_ranges_average_to_the_loss(line):
    found, _ = line
    for part in ("train", "heldout"):
        halves = zip(found[f"{part}_bin1"], found[f"{part}_bin2"], strict=True)
        assert found[part] == pytest.approx([(a + b) / 2 for a, b in halves])


def test_the_two_features_differ(line):
    assert line[0]["kid"] != line[0]["kid_2"]


def test_samples_of_every_checkpoint_are_on_the_sheet(line, subject):
    sheet = Image.open(line[1])
    assert sheet.size == (20 * SIDE, 3 * SIDE)
    first = sheet.crop((0, 0, SIDE, SIDE))
    assert first.tobytes() == subject.images[subject.subset(6, 0)[0]].tobytes()


def test_a_run_is_a_function_of_its_arguments(line, subject):
    again = run.run(subject, plan(), "gelu", 6, 0, 1e-2)
    times = ("step_ms", "seconds")
    assert {k: v for k, v in again.items() if k not in times} == {
        k: v for k, v in line[0].items() if k not in times
    }


def test_a_run_is_about_the_same_on_every_device(line, subject, device):
    def fresh():
        family = subject.fresh()
        family.denoiser.to(device)
        return family

    moved = run.run(dataclasses.replace(subject, fresh=fresh), plan(), "gelu", 6, 0, 1e-2)
    for name in ("steps", "parameters", "peak_bytes", "saved_bytes", "fold_steps"):
        assert moved[name] == line[0][name]
    for name in ("train", "heldout", "source", "fold_losses"):
        assert moved[name] == pytest.approx(line[0][name], rel=1e-3)


def test_losses_are_of_training_heldout_and_source_images(subject, monkeypatch):
    asked, real = [], run.losses

    def watched(family, rows, digests, chosen, draws, plan):
        asked.append((tuple(chosen), draws, rows is subject.rows))
        return real(family, rows, digests, chosen, draws, plan)

    monkeypatch.setattr(run, "losses", watched)
    run.run(subject, plan(draws=12), "base", 6, 0, 0.0)
    assert asked == [
        (subject.subset(6, 0), 2, True),
        (subject.parts["heldout"], 1, True),
        (tuple(range(3)), 1, False),
    ]


def test_samples_are_compared_with_the_reference(subject, monkeypatch):
    seen = []
    worth = dict.fromkeys(metrics.NAMES, 0.5)
    monkeypatch.setattr(metrics, "measure", lambda *features: seen.append(features) or worth)
    run.run(subject, plan(), "base", 6, 0, 0.0)
    for extractor, (samples, train, real) in zip(("halves", "pixels"), seen, strict=True):
        assert len(samples) == plan().samples
        assert train.equal(subject.features(extractor, subject.subset(6, 0)))
        assert real.equal(subject.features(extractor, subject.parts["reference"]))


def test_the_base_is_measured_once_and_trains_nothing(subject):
    found = run.run(subject, plan(), "base", 6, 0, 0.0)
    assert found["steps"] == [0] and found["parameters"] == found["early"] == 0
    assert len(found["kid"]) == 1 and found["fold_steps"] == []
    # no step was taken, so images of the base's own kind and others are alike
    assert parse({k: _text(v) for k, v in found.items()} | {"plan": ""}, 3).at("kid", 0)


def _text(value):
    from a3fta_kernels.study.table import shown

    return shown(value)


def test_a_trial_is_on_images_apart_and_ends_when_it_gets_worse(subject, monkeypatch):
    asked = []
    values = iter([3.0, 2.0, 5.0, 6.0])

    def losses(family, rows, digests, chosen, draws, plan):
        asked.append(tuple(chosen))
        return [next(values)] * plan.bins

    monkeypatch.setattr(run, "losses", losses)
    told = plan(checkpoints=(1, 2, 3, 4, 5), patience=1)
    found = run.trial(subject, told, "full", 1e-2, 100)
    assert (found["heldout"], found["steps"], found["best"]) == ([3, 2, 5], [1, 2, 3], 2)
    assert set(asked) == {subject.parts["tuning_heldout"]}


def test_a_trial_that_diverges_has_no_best(subject, monkeypatch):
    monkeypatch.setattr(run, "losses", lambda *_: [math.nan])
    assert math.isnan(run.trial(subject, plan(), "full", 1e-2, 100)["best"])
