"""Samples of a run: the stock pipeline's pictures, and a line about each drawing."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from PIL import Image

from a3fta_kernels.train import records
from a3fta_kernels.train.drawing import Prompt, Sampler, draw
from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.families import load
from a3fta_kernels.train.listener import Listener
from tests.train import setups

CPU = torch.device("cpu")
WORDS = ["a cat", "two dogs", "a cat"]


def prompts(family, words=WORDS):
    return [Prompt(text, family.encode_text(text)) for text in words]


def settings(**changes):
    return setups.settings(**{"sample_steps": 3, "seed": 11, "guidance": 4.0} | changes)


def close(ours, theirs):
    """The same picture, but for a rounding."""
    a, b = (np.asarray(image, dtype=int) for image in (ours, theirs))
    return a.shape == b.shape and abs(a - b).max() <= 1


def drawn(family, told, empty, size=(32, 32), **changes):
    options = {"steps": 3, "seed": 11, "guidance": 4.0, "batch": 1} | changes
    return draw(family, told, empty, size, **options, device=CPU)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("guidance", [0.0, 4.0])
def test_pictures_are_the_stock_pipeline_s(pipelines, kind, guidance):
    family = load(pipelines(kind), torch.float32)
    stock = DiffusionPipeline.from_pretrained(pipelines(kind))
    stock.set_progress_bar_config(disable=True)
    with family.encoding(CPU):
        told, empty = prompts(family), family.encode_text("")
    found = drawn(family, told, empty, (48, 32), guidance=guidance, batch=2)
    for i, (image, words) in enumerate(zip(found, WORDS, strict=True)):
        (expected,) = stock(
            words, width=48, height=32, num_inference_steps=3, guidance_scale=guidance,
            generator=torch.Generator().manual_seed(11 + i),
        ).images  # fmt: skip
        assert close(image, expected) and image.size == (48, 32)
    # another noise in every place
    assert not close(found[0], found[2])


def test_pictures_without_a_text_are_ddim_s(pipelines):
    family = load(pipelines("unet"), torch.float32)
    stock = DDIMPipeline.from_pretrained(pipelines("unet"))
    stock.set_progress_bar_config(disable=True)
    found = drawn(family, [Prompt("", {})] * 3, {}, (16, 16), batch=2)
    for i, image in enumerate(found):
        (expected,) = stock(
            num_inference_steps=3, generator=torch.Generator().manual_seed(11 + i)
        ).images
        assert close(image, expected)


def test_pictures_do_not_depend_on_the_batch_and_draw_nothing_else(pipelines):
    family = load(pipelines("classes"), torch.float32)
    told = [Prompt(str(i), {"label": torch.tensor(i)}) for i in (0, 2, 2)]
    before = torch.get_rng_state()
    one = drawn(family, told, {}, (16, 16), batch=1)
    three = drawn(family, told, {}, (16, 16), batch=3)
    assert all(close(a, b) for a, b in zip(one, three, strict=True))
    assert torch.equal(torch.get_rng_state(), before)
    # the same noise, another class
    (other,) = drawn(family, [Prompt("1", {"label": torch.tensor(1)})], {}, (16, 16))
    assert not close(other, one[0])


def picture(seed, side=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Copying:
    """A family that draws what it is told to."""

    def __init__(self, images):
        self.images = images

    def drawing(self, device):
        import contextlib

        return contextlib.nullcontext()

    def draw(self, texts, empty, size, steps, guidance, seeds):
        return [self.images[int(text["i"])] for text in texts]


def sampler(run, images, photos, others=(), **changes):
    told = [Prompt(f"number {i}", {"i": torch.tensor(i)}) for i in range(len(images))]
    names = [f"{i}.png" for i in range(len(photos))]
    return Sampler(
        run, Copying(images), settings(**changes), told, {}, photos, names, others, (16, 16), CPU,
        Listener(),
    )  # fmt: skip


def test_a_drawing_is_written_and_compared_with_the_photos(tmp_path):
    photos = [picture(i) for i in range(4)]
    images = [photos[2], picture(9)]
    sampler(tmp_path, images, photos)(7)
    (entry,) = records.read(tmp_path, records.SAMPLES)
    assert entry["step"] == 7 and entry["prompts"] == ["number 0", "number 1"]
    assert entry["files"] == ["samples/step-000007/0.png", "samples/step-000007/1.png"]
    for name, image in zip(entry["files"], images, strict=True):
        assert Image.open(tmp_path / name).tobytes() == image.tobytes()
    assert entry["nearest"][0] == "2.png"
    near, far = entry["distance"]
    assert near < 1e-3 < entry["threshold"] < far and entry["copies"] == 0.5


@pytest.mark.parametrize(("flip", "copies"), [(False, 0.0), (True, 1.0)])
def test_a_mirrored_copy_is_one_where_training_mirrors(tmp_path, flip, copies):
    photos = [picture(i) for i in range(4)]
    turned = photos[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    sampler(tmp_path, [turned], photos, flip=flip)(1)
    (entry,) = records.read(tmp_path, records.SAMPLES)
    assert entry["copies"] == copies
    assert entry["nearest"] == ["1.png"] or not flip


def test_photos_that_do_not_train_are_no_copies(tmp_path):
    photos, others = [picture(i) for i in range(4)], [picture(8)]
    sampler(tmp_path, others, photos, others)(1)
    (entry,) = records.read(tmp_path, records.SAMPLES)
    assert entry["copies"] == 0


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    call = sampler(tmp_path, [picture(0)], [picture(i) for i in range(3)])

    def full(self, *args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(TrainingError, match="cannot be written: No space left"):
        call(1)
    assert records.read(tmp_path, records.SAMPLES) == []
