"""What the families' pipelines call a timestep, on the scale of 0, clean, to 1000, noise."""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention

import a3fta_kernels as a3fta
from a3fta_kernels.adapters.timestep import now
from a3fta_kernels.processors import clock
from a3fta_kernels.timesteps import check_timed

from ..models.zoo import ZOO


class Seen(Exception):
    """The first adapted layer runs: what comes after does not matter."""


def seen_by_adapters(name: str, given: Any, **further: Any) -> list[float]:
    """The timesteps that a small model's adapters get where its forward gets `given`."""
    small = ZOO[name]
    model = small.build()
    report = a3fta.inject(model, a3fta.AdapterConfig(rank=2, design="film"))

    def stop(*_: Any) -> None:
        raise Seen(now().t.tolist())

    for layer in report.layers:
        model.get_submodule(layer).register_forward_pre_hook(stop)
    with pytest.raises(Seen) as caught, torch.no_grad():
        model(**small.batch() | further | {check_timed(model)[0]: given})
    return caught.value.args[0]


@pytest.mark.parametrize("name", ZOO)
def test_a_clean_sample_and_pure_noise(name: str):
    given = torch.tensor(ZOO[name].timesteps)
    if name == "stable_audio":  # of one timestep for all samples
        assert [seen_by_adapters(name, t[None]) for t in given] == [[0], [1000]]
    else:
        assert seen_by_adapters(name, given) == [0, 1000]


@pytest.mark.parametrize(
    ("name", "shape", "further"),
    [
        ("wan", (2, 8), {}),
        ("ltx", (2, 8), {}),
        ("skyreels_v2", (2, 2), {"enable_diffusion_forcing": True}),
        ("cosmos", (2, 1, 2, 1, 1), {}),
    ],
)
def test_timesteps_of_tokens_and_frames(name: str, shape: tuple[int, ...], further: dict):
    """The clean ones are what the model is given; the noisiest is what it works on."""
    clean, noise = ZOO[name].timesteps
    given = torch.full(shape, clean)
    given[0].view(-1)[-1] = noise
    assert seen_by_adapters(name, given, **further) == [1000, 0]


def with_config(**settings: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(**settings))


@pytest.mark.parametrize(
    ("read", "settings", "given", "t"),
    [
        (clock.steps, {}, [0, 250, 999], [0, 250, 999]),
        (clock.share, {}, [0, 0.25, 1], [0, 250, 1000]),
        (clock.share_left, {}, [1, 0.25, 0], [0, 750, 1000]),
        (clock.steps_left, {}, [1000, 250, 0], [0, 750, 1000]),
        # sigma of 1/3, 1 and 3: a quarter, a half, three quarters of noise
        (clock.log_sigma, {}, [-math.log(3) / 4, 0, math.log(3) / 4], [250, 500, 750]),
        (clock.cosmos, {"extra_pos_embed_type": "learnable"}, [0.0], [500]),
        (clock.cosmos, {"extra_pos_embed_type": None}, [0, 0.25], [0, 250]),
        (clock.sana, {"guidance_embeds": False, "timestep_scale": 1.0}, [250], [250]),
        (clock.sana, {"guidance_embeds": False, "timestep_scale": 0.001}, [0.25], [250]),
        (clock.sana, {"guidance_embeds": True, "timestep_scale": 1.0}, [0.25], [250]),
    ],
)
def test_readings(read: clock.Clock, settings: dict, given: list[float], t: list[float]):
    found = read(torch.tensor(given, dtype=torch.float64), with_config(**settings))
    torch.testing.assert_close(found, torch.tensor(t, dtype=torch.float64))


def test_the_settings_that_tell_are_those_of_diffusers():
    cosmos = inspect.signature(diffusers.CosmosTransformer3DModel).parameters
    sana = inspect.signature(diffusers.SanaTransformer2DModel).parameters
    assert "extra_pos_embed_type" in cosmos
    assert {"guidance_embeds", "timestep_scale"} <= set(sana)


class Unknown(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(query_dim=16, heads=2, dim_head=8)

    def forward(self, sample: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.attention(sample)


def test_a_model_outside_the_table_is_told_how_its_timestep_is_read():
    said = "its timestep is taken to run from 0, clean, to 1000, noise"
    assert said in str(a3fta.inject(Unknown(), a3fta.AdapterConfig(design="film")))
    assert said not in str(a3fta.inject(Unknown()))
