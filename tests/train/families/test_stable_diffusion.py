"""Stable Diffusion 1 and 2, and SDXL, against their pipelines and schedulers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from a3fta_kernels.train.families import Crop, stack
from tests.train.families import common


@pytest.mark.parametrize("name", ["sd", "sd_v", "sdxl"])
def test_a_step_along_the_target_ends_at_the_clean_latents(load, name):
    family = load(name)
    scheduler = diffusers.DDIMScheduler.from_config(family.pipe.scheduler.config, clip_sample=False)
    assert scheduler.config.prediction_type == ("v_prediction" if name == "sd_v" else "epsilon")
    x = family.clean(stack(common.rows(family, 3)), torch.Generator().manual_seed(3))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        level = ((t + 0.5) / 1000).expand(3)
        assert (family.noise.time(level) == t).all()
        noisy = family.noise.noisy(x, noise, level)
        torch.testing.assert_close(noisy, scheduler.add_noise(x, noise, t.expand(3)))
        target = family.noise.target(x, noise, level)
        back = scheduler.step(target, t, noisy).pred_original_sample
        torch.testing.assert_close(back, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sd_v"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(load, name):
    family = load(name)
    calls = common.denoiser_calls(family, num_inference_steps=3, guidance_scale=1.0)
    texts = stack([family.encode_text(p) for p in common.PROMPTS])
    assert len(calls) == 3
    for call, t in zip(calls, family.pipe.scheduler.timesteps, strict=True):
        time = family.noise.time((t + 0.5) / 1000)
        common.assert_told_the_same(family.inputs(call["sample"], time, texts), call)


def test_sdxl_is_told_sizes_and_cuts(load):
    """Of a photo 60 wide and 50 high, scaled to 33 x 28, of which 32 x 24 is left."""
    family = load("sdxl")
    crop = Crop(original=(60, 50), size=common.SIZE, top=2, left=1)
    photo = family.encode_photo(common.pixels(), crop)
    assert photo["time_ids"].tolist() == [50, 60, 2, 1, 24, 32]
    (call,) = common.denoiser_calls(
        family, num_inference_steps=1, guidance_scale=1.0, original_size=(50, 60),
        crops_coords_top_left=(2, 1), target_size=(24, 32),
    )  # fmt: skip
    texts = stack([family.encode_text(p) | photo for p in common.PROMPTS])
    told = family.inputs(call["sample"], call["timestep"], texts)
    added, stock = told.pop("added_cond_kwargs"), call.pop("added_cond_kwargs")
    common.assert_told_the_same(added, stock)
    common.assert_told_the_same(told, call)


def test_sdxl_is_told_sizes_that_bf16_does_not_have(load):
    family = load("sdxl")
    crop = Crop(original=(3022, 4025), size=common.SIZE, top=2, left=1)
    row = family.encode_photo(common.pixels(), crop) | family.encode_text("a dog")
    row = {k: v.bfloat16() if v.is_floating_point() else v for k, v in stack([row]).items()}
    family.denoiser.bfloat16()
    noisy = row["mean"]
    told = family.inputs(noisy, torch.zeros(1), row)
    assert told["added_cond_kwargs"]["time_ids"].tolist() == [[4025, 3022, 2, 1, 24, 32]]
    assert family.predict(family.denoiser, noisy, torch.zeros(1), row).dtype == torch.bfloat16


def test_sdxl_text_of_no_words(load):
    family = load("sdxl")
    assert family.pipe.config.force_zeros_for_empty_prompt
    empty, words = family.encode_text(""), family.encode_text("a dog")
    for name, value in empty.items():
        assert value.shape == words[name].shape and value.abs().max() == 0
    family.pipe.register_to_config(force_zeros_for_empty_prompt=False)
    assert all(value.abs().max() > 0 for value in family.encode_text("").values())


def test_sd_text_of_no_words_is_a_text(load):
    family = load("sd")
    empty = family.encode_text("")["prompt_embeds"]
    assert empty.abs().max() > 0
    _, negative = family.pipe.encode_prompt("a dog", "cpu", 1, True)
    assert torch.equal(empty, negative[0])
