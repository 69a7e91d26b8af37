"""Noise against diffusers' schedulers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from a3fta_kernels.train.batches import generator
from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.noise import Diffusion, Flow

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
LEVELS = torch.tensor([0.0, 1e-4, 0.1234, 0.5, 0.9995, 1.0])


def ddpm(**options):
    return DDPMScheduler(**(BETAS | options))


def images():
    draw = generator("images")
    return torch.randn(6, 4, 3, 5, generator=draw), torch.randn(6, 4, 3, 5, generator=draw)


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, PNDMScheduler])
def test_noisy_input_is_the_scheduler_s(kind):
    scheduler = kind(**BETAS)
    noise = Diffusion(scheduler.config)
    x, e = images()
    times = noise.time(LEVELS)
    assert times.tolist() == [0, 0, 123, 500, 999, 999] and times.dtype == torch.int64
    torch.testing.assert_close(noise.noisy(x, e, LEVELS), scheduler.add_noise(x, e, times))
    assert torch.equal(noise.target(x, e, LEVELS), e)


def test_a_sampler_s_config_is_read_as_training_s():
    """SDXL comes with Euler's scheduler, whose own add_noise is scaled otherwise."""
    noise, stock = Diffusion(EulerDiscreteScheduler(**BETAS).config), ddpm()
    x, e = images()
    expected = stock.add_noise(x, e, noise.time(LEVELS))
    torch.testing.assert_close(noise.noisy(x, e, LEVELS), expected)


def test_the_ends_are_nearly_clean_and_nearly_noise():
    noise = Diffusion(ddpm().config)
    x, e = images()
    first, last = noise.noisy(x, e, torch.zeros(6)), noise.noisy(x, e, torch.ones(6))
    torch.testing.assert_close(first, math.sqrt(1 - 0.00085) * x + math.sqrt(0.00085) * e)
    a = ddpm().alphas_cumprod[-1]
    assert a < 0.01
    torch.testing.assert_close(last, a.sqrt() * x + (1 - a).sqrt() * e)


@pytest.mark.parametrize("count", [10, 1000])
def test_every_time_is_drawn_as_often(count):
    noise = Diffusion(ddpm(num_train_timesteps=count).config)
    draws = 200 * count
    found = noise.time(noise.draw(draws, generator("draws"))).bincount(minlength=count)
    assert len(found) == count
    # five standard deviations of the count of one time
    assert (found - 200).abs().max() < 5 * math.sqrt(200)


def test_targets():
    x, e = images()
    velocity = Diffusion(ddpm(prediction_type="v_prediction").config)
    expected = ddpm(prediction_type="v_prediction").get_velocity(x, e, velocity.time(LEVELS))
    assert torch.equal(velocity.target(x, e, LEVELS), expected)
    a = ddpm().alphas_cumprod[velocity.time(LEVELS)].view(-1, 1, 1, 1)
    torch.testing.assert_close(expected, a.sqrt() * e - (1 - a).sqrt() * x)
    assert torch.equal(Diffusion(ddpm(prediction_type="sample").config).target(x, e, LEVELS), x)


def test_an_unknown_prediction_is_named():
    with pytest.raises(TrainingError, match="epsilon, v_prediction or sample, got 'score'"):
        Diffusion(ddpm(prediction_type="score").config)


@pytest.mark.parametrize("gamma", [0.5, 5.0, 1e9])
def test_min_snr_weights(gamma):
    a = ddpm().alphas_cumprod.double()
    level = (torch.arange(1000) + 0.5) / 1000
    snr = a / (1 - a)
    clipped = torch.minimum(snr, torch.tensor(gamma))
    for kind, expected in {
        "epsilon": clipped / snr, "v_prediction": clipped / (snr + 1), "sample": clipped
    }.items():  # fmt: skip
        noise = Diffusion(ddpm(prediction_type=kind).config)
        found = noise.weight(level, gamma).double()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
        assert torch.equal(noise.weight(level, None), torch.ones(1000))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_where_the_end_is_pure_noise(kind):
    noise = Diffusion(ddpm(rescale_betas_zero_snr=True, prediction_type=kind).config)
    assert noise.scheduler.alphas_cumprod[-1] == 0
    last = noise.weight(torch.ones(1), 5.0)
    assert last.item() == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}[kind]


def flow(**options):
    return Flow(FlowMatchEulerDiscreteScheduler(**options).config)


def test_flow_s_noisy_input_is_the_scheduler_s():
    scheduler = FlowMatchEulerDiscreteScheduler()
    noise = Flow(scheduler.config)
    x, e = images()
    level = scheduler.timesteps[[0, 1, 500, 900, 998, 999]] / 1000
    torch.testing.assert_close(noise.time(level), scheduler.timesteps[[0, 1, 500, 900, 998, 999]])
    expected = scheduler.scale_noise(x, noise.time(level), e)
    torch.testing.assert_close(noise.noisy(x, e, level), expected)
    assert torch.equal(noise.noisy(x, e, torch.zeros(6)), x)
    assert torch.equal(noise.noisy(x, e, torch.ones(6)), e)


def test_flow_s_target_is_its_derivative():
    noise = flow()
    x, e = images()
    a, b = noise.noisy(x, e, torch.full((6,), 0.25)), noise.noisy(x, e, torch.full((6,), 0.75))
    torch.testing.assert_close(noise.target(x, e, torch.rand(6)), (b - a) / 0.5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_draws_shifted_logit_normal_levels(shift):
    noise = flow(shift=shift)
    level = noise.draw(100_000, generator("flow"))
    assert level.min() > 0 and level.max() < 1
    # shifting adds log(shift) to the logit, which is normal
    logit = level.logit() - math.log(shift)
    assert abs(logit.mean()) < 0.02 and abs(logit.std() - 1) < 0.02
    assert abs((logit.abs() < 1).double().mean() - 0.6827) < 0.01


def test_flow_shifts_as_the_scheduler_shifts_its_own():
    noise = flow(shift=3.0)
    plain = torch.randn(1000, generator=generator("same")).sigmoid()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    even = torch.arange(1000, 0, -1) / 1000
    shifted = dict(zip(even.tolist(), scheduler.sigmas.tolist()[:1000], strict=True))
    assert shifted[0.5] == pytest.approx(0.75)
    expected = 3.0 * plain / (1 + 2.0 * plain)
    torch.testing.assert_close(noise.draw(1000, generator("same")), expected)


def test_a_flow_that_shifts_by_size_is_trained_without():
    dynamic = flow(shift=3.0, use_dynamic_shifting=True)
    assert torch.equal(dynamic.draw(9, generator(0)), flow().draw(9, generator(0)))


def test_flow_has_no_snr():
    assert torch.equal(flow().weight(LEVELS, None), torch.ones(6))
    with pytest.raises(TrainingError, match=r"snr_gamma: expected none .* got 5"):
        flow().weight(LEVELS, 5.0)
