"""Stable Diffusion 3, against its pipeline and its scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from a3fta_kernels.train import TrainingError
from a3fta_kernels.train.families import Crop, stack
from a3fta_kernels.train.families.sd3 import StableDiffusion3
from tests.train.families import common


def test_noise_is_the_schedulers(load):
    common.assert_flow_is_the_schedulers(load("sd3"), scale=1000, mu=None)


def test_levels_are_shifted_as_the_scheduler_shifts(load):
    levels = load("sd3").noise.draw(20000, torch.Generator().manual_seed(0))
    assert levels.min() > 0 and levels.max() < 1
    # the middle of a logit-normal is 1/2
    assert levels.median() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.01)


@pytest.mark.parametrize("name", ["sd3", "sd3_without_t5"])
def test_the_denoiser_is_told_what_the_pipeline_tells_it(load, name):
    family = load(name)
    calls = common.denoiser_calls(family, num_inference_steps=3, guidance_scale=1.0)
    texts = stack([family.encode_text(p) for p in common.PROMPTS])
    assert len(calls) == 3
    for call, sigma in zip(calls, family.pipe.scheduler.sigmas[:-1], strict=True):
        time = family.noise.time(sigma.expand(2))
        told = family.inputs(call["hidden_states"], time, texts)
        common.assert_told_the_same(told, call)


def test_texts_are_clips_then_t5s(load):
    with_t5, without = load("sd3").encode_text("a dog"), load("sd3_without_t5").encode_text("a dog")
    assert with_t5["prompt_embeds"].shape == without["prompt_embeds"].shape == (77 + 256, 64)
    assert with_t5["pooled_prompt_embeds"].shape == (64,)
    assert with_t5["prompt_embeds"][77:].abs().max() > 0
    assert without["prompt_embeds"][77:].abs().max() == 0


def test_a_long_text_is_cut(load):
    family = load("sd3")
    long, longer = (family.encode_text("a" * count) for count in (400, 500))
    assert long["prompt_embeds"].shape == (77 + 256, 64)
    assert all(torch.equal(long[name], longer[name]) for name in long)


def test_positions_have_a_limit(load):
    family = load("sd3")
    side = 16 * 4  # of pos_embed_max_size, in pixels
    row = family.encode_photo(common.pixels(side, 8), Crop((side, 8), (side, 8), 0, 0))
    text = family.encode_text("a dog")
    with torch.no_grad():
        time = family.noise.time(torch.tensor([0.5]))
        family.predict(family.denoiser, row["mean"][None], time, stack([row | text]))
    for size in ((side + 4, 8), (8, side + 4)):
        told = f"resolution: expected .* at most 64 .*, got {size[0]} x {size[1]}"
        with pytest.raises(TrainingError, match=told):
            family.encode_photo(common.pixels(*size), Crop(size, size, 0, 0))
        with pytest.raises(TrainingError, match=told):
            family.draw([text], text, size, 1, 1.0, [0])


def test_a_scheduler_of_another_kind_is_refused(load):
    pipe = load("sd3").pipe
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(TrainingError, match=r"scheduler: expected FlowMatch.*, got DPMSolver"):
        StableDiffusion3(pipe)
