"""Z-Image, against its pipeline and its scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from a3fta_kernels.train import Settings, TrainingError, recipe
from a3fta_kernels.train.families import stack
from a3fta_kernels.train.families.z_image import ZImage
from tests.train.families import common


@pytest.fixture
def family(load):
    return load("z_image")


def test_noise_is_the_schedulers(family):
    common.assert_flow_is_the_schedulers(family, scale=1, mu=None)


def test_levels_are_shifted_as_the_scheduler_shifts(family):
    levels = family.noise.draw(20000, torch.Generator().manual_seed(0))
    assert levels.median() == pytest.approx(3 / 4, abs=0.01)  # of a shift of 3


def test_a_prediction_is_what_the_pipeline_steps_along(family, monkeypatch):
    """From texts of two lengths, at every step."""
    step, seen = family.pipe.scheduler.step, []

    def noted(prediction, t, latents, **options):
        seen.append((prediction, t, latents))
        return step(prediction, t, latents, **options)

    monkeypatch.setattr(family.pipe.scheduler, "step", noted)
    common.denoiser_calls(family, num_inference_steps=3, guidance_scale=0.0)
    texts = stack([family.encode_text(p) for p in common.PROMPTS])
    assert len(seen) == 3 and texts["prompt_length"].unique().numel() == 2
    for prediction, t, latents in seen:
        time = family.noise.time((t / 1000).expand(2))
        with torch.no_grad():
            found = family.predict(family.denoiser, latents, time, texts)
        torch.testing.assert_close(found, prediction, rtol=1e-5, atol=1e-5)


def test_a_text_is_filled_up_and_a_long_one_cut(family):
    short = family.encode_text("a dog")
    length = int(short["prompt_length"])
    assert short["prompt_embeds"].shape == (512, 16) and 5 < length < 60
    assert short["prompt_embeds"][:length].abs().sum(1).min() > 0
    assert short["prompt_embeds"][length:].abs().max() == 0
    long, longer = (family.encode_text("a" * count) for count in (600, 700))
    assert int(long["prompt_length"]) == 512
    assert all(torch.equal(long[name], longer[name]) for name in long)
    # the text of no words is a chat without any
    assert 0 < int(family.encode_text("")["prompt_length"]) < length


def test_guidance_reads_the_text_of_no_words(family):
    text, empty = family.encode_text("a dog"), family.encode_text("")
    plain, led, other = (
        family.draw([text], untold, (16, 16), 2, guidance, [0])[0].tobytes()
        for untold, guidance in ((empty, 0.0), (empty, 5.0), (text, 5.0))
    )
    assert plain != led != other


def test_a_recording_is_refused(family):
    """It would be for one length of texts."""
    settings = Settings(model="m", data="d", cuda_graph=True)
    with pytest.raises(TrainingError, match=r"cuda_graph: expected .* one length, .* got ZImage"):
        recipe._check_family(settings, family)


def test_a_scheduler_of_another_kind_is_refused(family):
    family.pipe.scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TrainingError, match=r"scheduler: expected FlowMatch.*, got DDIM"):
        ZImage(family.pipe)
