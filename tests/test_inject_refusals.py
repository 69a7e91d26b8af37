"""What inject and eject refuse: a clear error that names the argument, a model as it was."""

from __future__ import annotations

import pytest
from diffusers.models.attention_processor import Attention
from torch import nn

import a3fta_kernels as a3fta

from . import models
from .models import assert_unchanged, snapshot

CONFIG = a3fta.AdapterConfig(rank=4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(name=""), ValueError, "name: expected letters"),
        (dict(name="a.b"), ValueError, "name: expected letters.*'a.b'"),
        (dict(name="keys"), ValueError, "name: expected letters.*'keys'"),
        (dict(name="training"), ValueError, "name: expected letters"),
        (dict(name=3), TypeError, "name: expected a string, got 3"),
        (dict(backend="fast"), ValueError, "backend: expected one of auto.*'fast'"),
        (dict(backend="triton"), a3fta.BackendUnavailableError, "backend 'triton' on cpu"),
        (dict(config={"rank": 4}), TypeError, "config: expected an AdapterConfig"),
        (dict(config=dict(targets="nowhere")), ValueError, "targets: .*'nowhere'"),
        (dict(config=dict(targets=("attn1", "attn"))), ValueError, "targets: .*'attn'"),
        (dict(config=dict(rank_pattern={"zzz": 2})), ValueError, "rank_pattern: .*'zzz'"),
        (
            dict(config=dict(targets="attn1", rank_pattern={"attn2": 2})),
            ValueError,
            "rank_pattern: .*'attn2'",
        ),
    ],
)
@pytest.mark.parametrize("call", [a3fta.inject, a3fta.attn_processors])
def test_refused(call, options, error, message):
    if options.get("backend") == "triton" and "cpu" in a3fta.backends()["triton"].devices:
        pytest.skip("the interpreter runs on the CPU")
    config = options.get("config")
    if isinstance(config, dict) and "rank" not in config:
        options = options | dict(config=a3fta.AdapterConfig(rank=4, **config))
    model = models.build("sd15")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        call(model, **options)
    assert_unchanged(model, before)


def test_the_same_name_twice():
    model = models.build("sd15")
    a3fta.inject(model, CONFIG)
    before = snapshot(model)
    with pytest.raises(ValueError, match="name: expected a name that the model does not have"):
        a3fta.inject(model, a3fta.AdapterConfig(rank=2))
    assert_unchanged(model, before)


def test_no_attention():
    model = models.build("unet2d", down_block_types=("DownBlock2D",) * 2,
                         up_block_types=("UpBlock2D",) * 2, add_attention=False)  # fmt: skip
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model: expected a model with attention.*UNet2DModel"):
        a3fta.inject(model)
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="got a Sequential with none"):
        a3fta.inject(nn.Sequential(nn.Linear(2, 2)))


def test_no_model():
    for wrong in (None, "unet", {"unet": 1}):
        with pytest.raises(TypeError, match="model: expected a diffusers model, or a pipeline"):
            a3fta.inject(wrong)


def test_a_wrapped_forward():
    model = models.build("sd15")
    layers = [m.to_out[0] for m in model.modules() if isinstance(m, Attention)]
    layers[-1].forward = lambda x: x
    before = snapshot(model)
    with pytest.raises(ValueError, match="inject first, then"):
        a3fta.inject(model)
    assert_unchanged(model, before)


def test_eject():
    model = models.build("sd15")
    with pytest.raises(ValueError, match=r"model: expected a model with adapters.*inject first"):
        a3fta.eject(model)
    a3fta.inject(model, CONFIG)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"name: .*\(default\), got 'other'"):
        a3fta.eject(model, "other")
    with pytest.raises(TypeError, match="name: expected a string or None"):
        a3fta.eject(model, 3)
    assert_unchanged(model, before)


def test_a_class_changed_since():
    model = models.build("sd15")
    a3fta.inject(model, CONFIG)
    layer = next(iter(a3fta.projections(model).values()))
    nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity())
    before = snapshot(model)
    with pytest.raises(ValueError, match="undo what changed the class"):
        a3fta.eject(model)
    assert_unchanged(model, before)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    a3fta.eject(model)
