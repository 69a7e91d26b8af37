from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from a3fta_kernels.study import bases, features, glyphs, pairs
from a3fta_kernels.study.subject import PARTS
from tests.study import tiny

COMMITTED = Path(__file__).resolve().parents[2] / "benchmarks" / "study" / "digits"


@pytest.fixture(scope="module")
def digits():
    return pairs.load("digits", COMMITTED)


def test_every_digit_is_in_one_part(digits):
    # those that teach the feature network are in none
    assert sum(len(digits.parts[name]) for name in PARTS) == 1797 - 500
    for name, each in (("reference", 50), ("heldout", 10), ("tuning", 10), ("tuning_heldout", 15)):
        labels = torch.tensor([digits.labels[i] for i in digits.parts[name]])
        assert labels.bincount().tolist() == [each] * 10
    assert len(digits.parts["pool"]) > 400


def test_the_base_knows_printed_digits_and_not_the_others(digits):
    from a3fta_kernels.study.plan import Plan
    from a3fta_kernels.study.training import losses, mean

    family, names = digits.fresh(), [f"source {i}" for i in range(50)]
    family.denoiser.eval()
    printed = mean(losses(family, digits.source, names, range(50), 1, Plan()))
    target = digits.parts["heldout"][:50]
    written = mean(losses(family, digits.rows, digits.digests, target, 1, Plan()))
    assert printed < 0.25 < 0.4 < written


def test_the_feature_network_reads_handwriting(digits):
    network = features.load(COMMITTED / "features" / "digits.safetensors", 8, 10)
    part = digits.parts["reference"]
    labels = torch.tensor([digits.labels[i] for i in part])
    assert tiny.accuracy(network, [digits.images[i] for i in part], labels) > 0.9


def test_real_images_are_worth_more_than_others(digits):
    from a3fta_kernels.study import metrics

    real, pool = (digits.features("network", digits.parts[p]) for p in ("reference", "pool"))
    mirrored = digits.extractors["network"](
        [digits.images[i].transpose(0) for i in digits.parts["pool"]]
    )
    assert abs(metrics.kid(pool, real)) < 0.1 * metrics.kid(mirrored, real)
    assert metrics.manifolds(pool, real)["recall"] > 0.8


@pytest.fixture
def small(monkeypatch):
    """Scripts of fewer letters and fonts, on smaller canvases."""
    frame = glyphs.Frame(16, 2, 48, 32)
    for name in ("latin", "greek", "georgian"):
        script = glyphs.SCRIPTS[name]
        fewer = glyphs.Script(script.characters[:20], script.fonts[:5])
        monkeypatch.setitem(glyphs.SCRIPTS, name, fewer)
        if name != "latin":
            pair = dataclasses.replace(pairs.PAIRS[name], frame=frame)
            monkeypatch.setitem(pairs.PAIRS, name, pair)


def test_what_is_missing_is_made_and_then_kept(tmp_path, monkeypatch, small):
    made = []

    def pretrain(unet, schedule, batch, steps, lr, seed, device):
        x, _ = batch(torch.Generator().manual_seed(0))
        made.append((x.shape, unet["num_class_embeds"]))
        return UNet2DModel(**unet)

    monkeypatch.setattr(bases, "pretrain", pretrain)
    monkeypatch.setattr(features, "_EPOCHS", 1)
    one = pairs.load("greek", tmp_path)
    assert made == [((64, 1, 16, 16), None)]
    pairs.load("greek", tmp_path)
    assert len(made) == 1 and (tmp_path / "features" / "greek.safetensors").exists()
    assert "label" not in one.rows[0] and one.size == (16, 16)
    assert one.fresh().classes is None
    # a base of the same source serves other scripts
    pairs.load("georgian", tmp_path)
    assert len(made) == 1


def test_letters_at_32_are_those_at_16_drawn_larger(tmp_path, monkeypatch, small):
    made = []

    def pretrain(unet, schedule, batch, steps, lr, seed, device):
        made.append((unet["sample_size"], len(unet["block_out_channels"]), device))
        return UNet2DModel(**unet)

    monkeypatch.setattr(bases, "pretrain", pretrain)
    monkeypatch.setattr(features, "_EPOCHS", 1)
    frame = glyphs.Frame(32, 2, 48, 32)
    large = dataclasses.replace(pairs.PAIRS["georgian-32"], frame=frame)
    monkeypatch.setitem(pairs.PAIRS, "georgian-32", large)
    ours = pairs.load("georgian-32", tmp_path)
    assert made == [(32, 4, "cpu")] and ours.size == (32, 32)
    assert [p.name for p in (tmp_path / "bases").iterdir()] == ["latin-32.safetensors"]
    small_x, small_labels, parts = pairs._letters(pairs.PAIRS["georgian"])
    assert ours.labels is None and len(ours.images) == len(small_labels)
    assert ours.parts == {name: part for name, part in parts.items() if name in PARTS}
    # of the same variations: the smaller is about the mean of the larger's blocks
    x = torch.stack([row["mean"] for row in ours.rows])
    off = torch.nn.functional.avg_pool2d(x, 2) - small_x
    assert off.abs().mean() < 0.15 < small_x.std()


def test_a_shape_is_in_one_part_alone(small):
    letters = torch.arange(240) % 20
    shares = pairs._shares(letters)
    assert torch.cat(list(shares.values())).sort().values.tolist() == list(range(240))
    for name, shapes in shares.items():
        # twelve of a letter, of which so many
        share = 12 * pairs._LETTER_PARTS[name] / sum(pairs._LETTER_PARTS.values())
        each = letters[shapes].bincount(minlength=20)
        assert share - 1 <= each.min() and each.max() <= share + 1
    x, labels, parts = pairs._letters(pairs.PAIRS["georgian"])
    assert len(x) == len(labels) == sum(map(len, parts.values()))
    assert {name: len(part) for name, part in parts.items()} == pairs._LETTER_PARTS
    images = [{x[i].numpy().tobytes() for i in part} for part in parts.values()]
    assert sum(map(len, images)) == len(set.union(*images))


def test_the_second_base_is_another_of_the_same_target(tmp_path, monkeypatch, digits):
    made = []

    def pretrain(unet, schedule, batch, steps, lr, seed, device):
        made.append((unet["block_out_channels"], seed))
        return UNet2DModel(**unet)

    monkeypatch.setattr(bases, "pretrain", pretrain)
    monkeypatch.setattr(features, "_EPOCHS", 1)
    second = pairs.load("digits-2", tmp_path)
    assert made == [((48, 64), 1)]
    assert [p.name for p in (tmp_path / "bases").iterdir()] == ["digits-8-1.safetensors"]
    assert second.parts == digits.parts
    assert all(a["mean"].equal(b["mean"]) for a, b in zip(second.rows, digits.rows, strict=True))


def test_a_search_trains_on_nothing_and_is_judged_by_nothing_of_the_runs(digits):
    search = pairs.load("digits-search", COMMITTED)
    assert search.rows[7]["mean"].equal(digits.rows[7]["mean"])

    def of(subject, *names):
        return {i for name in names for i in subject.parts[name]}

    assert of(search, "pool", "tuning") == of(digits, "tuning")
    assert of(search, "heldout", "tuning_heldout") == of(digits, "tuning_heldout")
    assert of(search, "reference") == of(digits, "pool")
    assert not of(search, *PARTS) & of(digits, "reference", "heldout")
    # every class is in every part
    for name in PARTS:
        assert len({search.labels[i] for i in search.parts[name]}) == 10


def test_another_pair_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"pair: expected one of digits, .*, got 'klingon'"):
        pairs.load("klingon", tmp_path)


def test_letters_that_the_base_has_learned_are_left_out(small):
    pair = pairs.PAIRS["greek"]
    drawn, letters = pairs._unseen(pair)
    characters, fonts = glyphs.SCRIPTS["greek"].characters, glyphs.SCRIPTS["greek"].fonts
    # of the first 20 capitals those that are not among A to T, a class each
    alike = "\u0391\u0392\u0395\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4"
    new = [c for c in characters if c not in alike]
    assert letters.unique().tolist() == list(range(len(new)))
    assert len(drawn) == len(letters) == len(new) * len(fonts)
    source, _ = glyphs.render(glyphs.SCRIPTS["latin"], pair.frame)
    assert not any(torch.equal(one, other) for one in drawn for other in source)
