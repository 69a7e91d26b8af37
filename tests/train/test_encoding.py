"""Photos and texts as tensors: diffusers' own numbers, and each of them once."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from a3fta_kernels.train.cache import Cache
from a3fta_kernels.train.encoding import Encoder
from a3fta_kernels.train.families import load
from a3fta_kernels.train.photos import find

CPU = torch.device("cpu")


def families(pipelines, *kinds):
    return [load(pipelines(kind), torch.float32) for kind in kinds]


@pytest.fixture
def photos(tmp_path):
    """One that fits 32 x 32 as it is, and one that is wider."""
    draw = np.random.default_rng(0)
    for name, height, width in (("a", 32, 32), ("b", 40, 80)):
        pixels = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a photo" if name == "a" else "another")
    return find(tmp_path, resolution=32, captions=True).items


def count(family, monkeypatch):
    """How often the encoders are asked, as a list that grows."""
    asked = []

    def counted(name, encode):
        def call(*args):
            asked.append(name)
            return encode(*args)

        return call

    for name in ("encode_photo", "encode_text"):
        monkeypatch.setattr(family, name, counted(name, getattr(family, name)))
    return asked


SIZES = [(32, 32), (48, 24)]


def test_all_photos_come_before_the_texts(pipelines, photos, monkeypatch):
    """What encodes the ones is moved out for the others; and for what is cached nothing is."""
    (family,) = families(pipelines, "sd")
    brought = []
    monkeypatch.setattr(family, "bring", brought.append)
    encoder = Encoder(family, Cache(None))
    encoder.rows(photos, SIZES)
    assert brought == ["photos", "photos", "texts", "texts"]
    encoder.text("a photo")
    assert len(brought) == 4


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_is_encoded_is_what_diffusers_encodes(pipelines, photos, kind):
    (family,) = families(pipelines, kind)
    pipe, (row, wide) = family.pipe, Encoder(family, Cache(None)).rows(photos, SIZES)
    pixels = VaeImageProcessor().preprocess(photos[0].open())
    with torch.no_grad():
        stock = pipe.vae.encode(pixels).latent_dist
        scale = pipe.vae.config.scaling_factor
        torch.testing.assert_close(row["mean"], stock.mean[0] * scale)
        torch.testing.assert_close(row["std"], stock.std[0] * scale)
        # a draw of ours is a draw of theirs
        drawn = family.clean({k: v[None] for k, v in row.items()}, torch.Generator().manual_seed(3))
        theirs = stock.sample(torch.Generator().manual_seed(3)) * scale
        torch.testing.assert_close(drawn, theirs)
        found = pipe.encode_prompt("a photo", device=CPU, num_images_per_prompt=1,
                                   do_classifier_free_guidance=False)  # fmt: skip
    torch.testing.assert_close(row["prompt_embeds"], found[0][0])
    if kind == "sdxl":
        torch.testing.assert_close(row["pooled_prompt_embeds"], found[2][0])
    assert wide["mean"].shape == (4, 12, 24)
    assert not torch.equal(wide["prompt_embeds"], row["prompt_embeds"])


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_empty_text_is_what_diffusers_guides_with(pipelines, kind):
    (family,) = families(pipelines, kind)
    empty = Encoder(family, Cache(None)).text("")
    with torch.no_grad():
        found = family.pipe.encode_prompt("a cat", device=CPU, num_images_per_prompt=1,
                                          do_classifier_free_guidance=True)  # fmt: skip
    torch.testing.assert_close(empty["prompt_embeds"], found[1][0])
    if kind == "sdxl":
        torch.testing.assert_close(empty["pooled_prompt_embeds"], found[3][0])


def test_sdxl_is_told_sizes_and_the_cut(pipelines, photos):
    (family,) = families(pipelines, "sdxl")
    square, wide = Encoder(family, Cache(None)).rows(photos, [(32, 32), (32, 32)])
    assert square["time_ids"].tolist() == [32, 32, 0, 0, 32, 32]
    # 80 x 40 becomes 64 x 32, of which 32 are cut from column 16 on; heights come first
    assert wide["time_ids"].tolist() == [40, 80, 0, 16, 32, 32]
    stock = family.pipe._get_add_time_ids((40, 80), (0, 16), (32, 32), torch.float32, 32)
    torch.testing.assert_close(wide["time_ids"].float(), stock[0])


def test_a_mirrored_photo_is_the_mirrored_pixels_encoded(pipelines, photos):
    (family,) = families(pipelines, "sd")
    encoder = Encoder(family, Cache(None))
    turned = photos[0].open().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with torch.no_grad():
        stock = family.pipe.vae.encode(VaeImageProcessor().preprocess(turned)).latent_dist.mean
    found = encoder.photo(photos[0], SIZES[0], mirrored=True)["mean"]
    torch.testing.assert_close(found, stock[0] * family.pipe.vae.config.scaling_factor)
    assert not torch.equal(found, encoder.photo(photos[0], SIZES[0])["mean"])


def test_what_was_encoded_is_not_encoded_again(pipelines, photos, tmp_path, monkeypatch):
    first, second = families(pipelines, "sd", "sd")
    expected = Encoder(first, Cache(tmp_path / "cache")).rows(photos, SIZES)
    asked = count(second, monkeypatch)
    encoder = Encoder(second, Cache(tmp_path / "cache"))
    found = encoder.rows(photos, SIZES)
    assert asked == []
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # each of these is another entry, and then it is one
    for _ in range(2):
        encoder.photo(photos[0], (24, 24))
        encoder.photo(photos[0], SIZES[0], mirrored=True)
        encoder.text("a third")
    assert asked == ["encode_photo", "encode_photo", "encode_text"]


def _weights(pipe):
    pipe.vae.encoder.conv_in.weight.data.mul_(1.5)


def _text_weights(pipe):
    pipe.text_encoder.get_input_embeddings().weight.data.mul_(1.5)


def _scale(pipe):
    pipe.vae.register_to_config(scaling_factor=0.5)


@pytest.mark.parametrize("change", [_weights, _text_weights, _scale])
def test_other_encoders_make_other_entries(pipelines, photos, tmp_path, monkeypatch, change):
    first, second = families(pipelines, "sd", "sd")
    cache = Cache(tmp_path / "cache")
    (expected,) = Encoder(first, cache).rows(photos[:1], SIZES[:1])
    change(second.pipe)
    asked = count(second, monkeypatch)
    (found,) = Encoder(second, cache).rows(photos[:1], SIZES[:1])
    assert asked == ["encode_photo", "encode_text"]
    assert any(not torch.equal(found[name], expected[name]) for name in found)


def test_what_trains_and_where_it_lies_make_no_other_entry(
    pipelines, photos, tmp_path, monkeypatch
):
    moved = tmp_path / "moved"
    shutil.copytree(pipelines("sd"), moved)
    (first,) = families(pipelines, "sd")
    second = load(str(moved), torch.float32)
    second.denoiser.conv_in.weight.data.zero_()
    cache = Cache(tmp_path / "cache")
    Encoder(first, cache).rows(photos[:1], SIZES[:1])
    asked = count(second, monkeypatch)
    Encoder(second, cache).rows(photos[:1], SIZES[:1])
    assert asked == []


def test_classes_are_labels_and_pixels_are_pixels(pipelines, tmp_path):
    for label in (0, 2):
        (tmp_path / str(label)).mkdir()
        image = Image.new("RGB", (16, 16), (255 * (label > 0), 0, 51))
        image.save(tmp_path / str(label) / "x.png")
    items = find(tmp_path, resolution=16, captions=False, labels=3).items
    (family,) = families(pipelines, "classes")
    encoder = Encoder(family, Cache(None))
    rows = encoder.rows(items, [(16, 16)] * 2)
    assert [row["label"].item() for row in rows] == [0, 2]
    assert rows[1]["mean"][:, 3, 5].tolist() == pytest.approx([1, -1, -0.6])
    assert encoder.text("anything") == {}
    assert set(rows[0]) == {"mean", "label"}
