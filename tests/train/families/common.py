"""Every family's small pipeline, and what tests ask of several families."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from a3fta_kernels.train.families import Crop, Family, Row, stack
from tests.examples import pipelines
from tests.train import runs_on_disk

PIPELINES: dict[str, Callable[[Path], None]] = {
    "unconditional": runs_on_disk.write_unet,
    "class_conditional": functools.partial(runs_on_disk.write_unet, num_class_embeds=2),
    "sd": pipelines.write_sd,
    "sd_v": functools.partial(pipelines.write_sd, prediction_type="v_prediction"),
    "sdxl": pipelines.write_sdxl,
    "sd3": pipelines.write_sd3,
    "sd3_without_t5": functools.partial(pipelines.write_sd3, t5=False),
    "flux": pipelines.write_flux,
    "z_image": pipelines.write_z_image,
    "flux_schnell": functools.partial(pipelines.write_flux, distilled=False),
}

PROMPTS = ("a photo of a dog", "two cats")  # Z-Image's pipeline writes into a list
SIZE = (32, 24)  # (width, height)


def pixels(width: int = SIZE[0], height: int = SIZE[1], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, height, width, generator=generator) * 2 - 1


def rows(family: Family, count: int = 2) -> list[Row]:
    """Encoded photos of SIZE with their captions."""
    crop = Crop((60, 50), SIZE, 1, 3)
    return [
        family.encode_photo(pixels(seed=i), crop) | family.encode_text(PROMPTS[i % 2])
        for i in range(count)
    ]


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def denoiser_calls(family: Family, **options: Any) -> list[dict[str, Any]]:
    """What the stock pipeline gives its denoiser, step by step, to draw PROMPTS."""
    found: list[dict[str, Any]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({**dict(zip(("sample", "timestep"), args, strict=False)), **kwargs})

    handle = family.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        family.pipe(
            list(PROMPTS), width=SIZE[0], height=SIZE[1], output_type="latent",
            generator=generators([0, 1]), **options,
        )  # fmt: skip
    finally:
        handle.remove()
    return found


def assert_told_the_same(told: dict[str, Any], stock: dict[str, Any]) -> None:
    """Every tensor that the family gives is the pipeline's; what else that gives is None or {}."""
    for name, value in told.items():
        torch.testing.assert_close(value, stock[name].to(value.dtype), rtol=1e-6, atol=1e-6)
    left = {k: v for k, v in stock.items() if k not in told and k != "return_dict"}
    assert not any(isinstance(v, Tensor) or v for v in left.values()), left


def assert_close_images(a: Sequence[Image.Image], b: Sequence[Image.Image], most: int = 1) -> None:
    """Equal up to the rounding of a pixel."""
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.size == other.size and one.mode == other.mode
        apart = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
        assert apart.max() <= most


def assert_flow_is_the_schedulers(family: Family, scale: float, mu: float | None) -> None:
    """Noisy latents and times are the scheduler's; its steps along the target end at the clean
    latents, and pass through the noisy ones."""
    scheduler = type(family.pipe.scheduler).from_config(family.pipe.scheduler.config)
    x = family.clean(stack(rows(family, 3)), torch.Generator().manual_seed(3))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    places = [10, 500, 990]
    level = scheduler.sigmas[places]
    expected = scheduler.scale_noise(x, scheduler.timesteps[places], noise)
    torch.testing.assert_close(family.noise.noisy(x, noise, level), expected)
    times = family.noise.time(level) * 1000 / scale
    torch.testing.assert_close(times, scheduler.timesteps[places])

    scheduler.set_timesteps(4, mu=mu)
    now = noise
    for t, after in zip(scheduler.timesteps, scheduler.sigmas[1:], strict=True):
        level = (t / 1000).expand(3)
        now = scheduler.step(family.noise.target(x, noise, level), t, now).prev_sample
        torch.testing.assert_close(now, family.noise.noisy(x, noise, after.expand(3)))
    torch.testing.assert_close(now, x)
