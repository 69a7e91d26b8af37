"""Flux, against its pipeline and its scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from a3fta_kernels.train import TrainingError
from a3fta_kernels.train.families import stack
from a3fta_kernels.train.families.flux import Flux, pack, unpack
from tests.train.families import common

NAMES = ["flux", "flux_schnell"]


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_the_schedulers(load, name):
    common.assert_flow_is_the_schedulers(load(name), scale=1, mu=0.8)


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_not_shifted(load, name):
    levels = load(name).noise.draw(20000, torch.Generator().manual_seed(0))
    assert levels.min() > 0 and levels.max() < 1
    assert levels.median() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_is_told_what_the_pipeline_tells_it(load, name):
    family = load(name)
    calls = common.denoiser_calls(family, num_inference_steps=3, guidance_scale=1.0)
    texts = stack([family.encode_text(p) for p in common.PROMPTS])
    assert len(calls) == 3
    for call, sigma in zip(calls, family.pipe.scheduler.sigmas[:-1], strict=True):
        latents = unpack(call["hidden_states"], 12, 16)
        told = family.inputs(latents, family.noise.time(sigma.expand(2)), texts)
        assert ("guidance" in told) == (name == "flux")
        common.assert_told_the_same(told, call)


def test_packs_are_the_pipelines():
    latents = torch.randn(2, 4, 12, 16)
    tokens = pack(latents)
    expected = diffusers.FluxPipeline._pack_latents(latents, 2, 4, 12, 16)
    assert torch.equal(tokens, expected)
    assert torch.equal(unpack(tokens, 12, 16), latents)


def test_a_prediction_is_unpacked(load):
    family = load("flux")
    rows = stack(common.rows(family))
    noisy = torch.randn(rows["mean"].shape)
    time = family.noise.time(torch.tensor([0.3, 0.6]))
    with torch.no_grad():
        tokens = family.denoiser(**family.inputs(noisy, time, rows)).sample
        found = family.predict(family.denoiser, noisy, time, rows)
    assert torch.equal(found, family.pipe._unpack_latents(tokens, 24, 32, 2))


def test_guidance_is_a_number_for_the_distilled_alone(load):
    for name in NAMES:
        family = load(name)
        text = family.encode_text("a dog")
        one, five = (family.draw([text], text, (16, 16), 2, g, [0])[0] for g in (1.0, 5.0))
        assert (one.tobytes() != five.tobytes()) == (name == "flux")


def test_a_long_text_is_cut(load):
    family = load("flux")
    long, longer = (family.encode_text("a" * count) for count in (600, 700))
    assert long["prompt_embeds"].shape == (512, 32)
    assert long["pooled_prompt_embeds"].shape == (32,)
    assert all(torch.equal(long[name], longer[name]) for name in long)


def test_a_scheduler_of_another_kind_is_refused(load):
    pipe = load("flux").pipe
    pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TrainingError, match=r"scheduler: expected FlowMatch.*, got DDIM"):
        Flux(pipe)
