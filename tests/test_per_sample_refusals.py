"""adapters_per_sample: what is refused, with nothing changed."""

from __future__ import annotations

import pytest
import torch

import a3fta_kernels as a3fta

from . import models
from .models import assert_unchanged, snapshot
from .test_per_sample import served


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "z"], ValueError, r"names: expected adapters that .* \(a, b, c\), got 'z'"),
        ("a", TypeError, "names: expected a list with the name of an adapter, or None"),
        (["a", 1], TypeError, "names: expected a list with the name of an adapter, or None"),
        ([], ValueError, "names: expected at least one sample"),
    ],
)
def test_bad_names(names, error, message):
    model = served("unet2d")
    before = snapshot(model)
    with pytest.raises(error, match=message), a3fta.adapters_per_sample(model, names):
        raise AssertionError
    assert_unchanged(model, before)


def test_bad_batches():
    model = served("unet2d")
    message = "model: expected a batch of 2 samples, as many as have names, or two or three .* got "
    with a3fta.adapters_per_sample(model, ["a", None]):
        for batch in (1, 3, 8):  # 8: two images of each of two prompts, and guidance
            inputs = models.inputs("unet2d", batch=batch, dtype=torch.float64)
            with pytest.raises(ValueError, match=f"{message}{batch}; names are of images"):
                model(**inputs)
        layer = next(iter(a3fta.projections(model).values()))
        with pytest.raises(ValueError, match=message):
            layer(torch.zeros(3, 5, layer.in_features, dtype=torch.float64))


def test_what_cannot_be_inside(tmp_path):
    model = served("unet2d")
    a3fta.save_adapter(model, tmp_path, "a")
    inside = "expected no block of adapters_per_sample around a call to"
    with a3fta.adapters_per_sample(model, ["a", None]):
        for call in (
            lambda: a3fta.set_adapters(model, "a"),
            lambda: a3fta.load_adapter(model, tmp_path, "a"),
            lambda: a3fta.merge(model),
            lambda: a3fta.eject(model),
            lambda: a3fta.inject(model, a3fta.AdapterConfig(rank=2), name="d"),
            lambda: a3fta.adapters_per_sample(model, ["a"]).__enter__(),
        ):
            with pytest.raises(ValueError, match=inside):
                call()
        a3fta.save_adapter(model, tmp_path, "b")
    a3fta.set_adapters(model, "a")


def test_dropout_in_training_is_refused_by_name():
    model = models.build("unet2d")
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, dropout=0.5), name="a")
    with a3fta.adapters_per_sample(model, ["a"]):
        pass
    message = r"names: expected adapters without dropout to .* model.eval.*'a' with dropout=0.5 at"
    with pytest.raises(ValueError, match=message), a3fta.adapters_per_sample(model.train(), ["a"]):
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"design": "film"},
            "the same at all timesteps to .* 'timed' with design='film' at mid_block",
        ),
        (
            {"time_window": (0, 500)},
            r"all timesteps .* with time_window=\(0.0, 500.0\) at mid_block",
        ),
        ({"design": "film", "time_rank": 1}, "all timesteps .*design='film', time_rank=1 at"),
        ({"layer_norm": True}, "that read h as it is .*'timed' with layer_norm=True at mid_block"),
        ({"train": "adapter+attention"}, "adapters alone, got 'timed', with which attention's own"),
    ],
)
def test_what_is_not_of_one_sample_is_refused_by_name(options, message):
    model = models.build("unet2d")
    targets = ("mid_block",)
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, targets=targets), name="plain")
    a3fta.inject(model, a3fta.AdapterConfig(rank=2, targets=targets, **options), name="timed")
    named = ["plain", "timed"]
    with pytest.raises(ValueError, match=message), a3fta.adapters_per_sample(model, named):
        raise AssertionError
    assert all(layer.banks is None for layer in a3fta.projections(model).values())
    if "train" in options:  # acting, it would act on all samples
        a3fta.enable_adapters(model)
        with pytest.raises(ValueError, match=message):
            a3fta.adapters_per_sample(model, ["plain"]).__enter__()
        a3fta.set_adapters(model, "plain")
    with a3fta.adapters_per_sample(model, ["plain"]):
        pass
