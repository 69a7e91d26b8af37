"""UNet2DModel on pixels, against its pipelines and schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from a3fta_kernels.train import TrainingError
from a3fta_kernels.train.families import Crop, stack
from a3fta_kernels.train.families.unconditional import Unconditional
from tests import models
from tests.train.families import common


def family_of(scheduler=None, **options):
    torch.manual_seed(0)
    options = {"in_channels": 3, "out_channels": 3} | options
    unet = models.unet2d(**options).eval()
    return Unconditional(diffusers.DDPMPipeline(unet, scheduler or diffusers.DDPMScheduler()))


def test_photos_are_their_pixels(load):
    family = load("unconditional")
    pixels = common.pixels(24, 16)
    row = family.encode_photo(pixels, Crop((24, 16), (24, 16), 0, 0)) | family.encode_text("a")
    assert list(row) == ["mean"]
    assert torch.equal(family.clean(stack([row]), torch.Generator())[0], pixels)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_step_along_the_target_ends_at_the_photo(kind):
    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    family = family_of(scheduler)
    x = torch.stack([common.pixels(16, 16, seed) for seed in range(3)])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        level = ((t + 0.5) / 1000).expand(3)
        assert (family.noise.time(level) == t).all()
        noisy = family.noise.noisy(x, noise, level)
        target = family.noise.target(x, noise, level)
        back = scheduler.step(target, t, noisy).pred_original_sample
        torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


def test_images_are_those_of_ddim(load):
    family = load("unconditional")
    stock = diffusers.DDIMPipeline(family.denoiser, family.pipe.scheduler)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        batch_size=2, generator=common.generators([3, 4]), num_inference_steps=4
    ).images  # fmt: skip
    found = family.draw([{}, {}], {}, (16, 16), 4, 5.0, [3, 4])
    common.assert_close_images(found, expected)
    assert found[0].tobytes() != found[1].tobytes()
    (wide,) = family.draw([{}], {}, (24, 16), 2, 5.0, [3])
    assert wide.size == (24, 16)


@pytest.mark.parametrize("kind", [None, "timestep"])
def test_classes_reach_the_model(kind):
    family = family_of(num_class_embeds=2, class_embed_type=kind)
    assert family.classes == 2 and not family.captions
    rows = [{"mean": common.pixels(16, 16), "label": torch.tensor(i)} for i in (0, 1, 1)]
    noisy, time = torch.stack([r["mean"] for r in rows]), torch.tensor([500, 500, 500])
    with torch.no_grad():
        found = family.predict(family.denoiser, noisy, time, stack(rows))
        expected = family.denoiser(noisy, time, class_labels=torch.tensor([0, 1, 1])).sample
    assert torch.equal(found, expected)
    torch.testing.assert_close(found[1], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    labels = [{"label": torch.tensor(i)} for i in (0, 1)]
    zero, one = family.draw(labels, {}, (16, 16), 2, 1.0, [3, 3])
    assert zero.tobytes() != one.tobytes()


def test_gray_images(load):
    family = family_of(in_channels=1, out_channels=1)
    (image,) = family.draw([{}], {}, (16, 16), 2, 1.0, [0])
    assert image.mode == "L" and image.size == (16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 4, "out_channels": 4}, "expected 1 or 3 channels, got 4"),
        ({"class_embed_type": "identity"}, "expected a UNet2DModel of .*'identity'"),
        ({"class_embed_type": "timestep"}, "'timestep', num_class_embeds=None"),
        ({"sample_size": None}, "and a sample_size, got .*sample_size=None"),
    ],
)
def test_other_models_are_refused(options, message):
    with pytest.raises(TrainingError, match=message):
        family_of(**options)


def test_a_scheduler_of_another_target_is_refused():
    scheduler = diffusers.DDPMScheduler(prediction_type="flow")
    with pytest.raises(TrainingError, match=r"expected prediction_type .*, got 'flow'"):
        family_of(scheduler)
