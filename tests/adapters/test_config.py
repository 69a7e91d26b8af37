"""AdapterConfig: defaults, the way to JSON and back, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from a3fta_kernels.adapters import AdapterConfig

FULL = AdapterConfig(
    rank=8, activation="silu", scale=0.5, bias=False, dropout=0.1, targets=("attn1", "mid_block"),
    rank_pattern={"mid": 4}, dtype=torch.bfloat16, train="adapter+attention", layer_norm=True,
    drop_path=0.2, time_window=(100, 900.5), time_rank=2,
)  # fmt: skip


@pytest.mark.parametrize("config", [AdapterConfig(), FULL, AdapterConfig(targets="attn1$")])
def test_survives_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_file_from_before_these_fields_loads():
    new = ("train", "layer_norm", "drop_path", "time_window", "time_rank")
    old = {key: value for key, value in AdapterConfig(rank=8).to_dict().items() if key not in new}
    assert AdapterConfig.from_dict(old) == AdapterConfig(rank=8)


def test_what_depends_on_the_timestep():
    assert AdapterConfig(design="film").timed and AdapterConfig(design="time_scaled").timed
    assert AdapterConfig(time_rank=1).timed and AdapterConfig(time_window=(0, 1)).timed
    assert not AdapterConfig(layer_norm=True, drop_path=0.1).timed


def test_rank_for_takes_the_first_match():
    config = AdapterConfig(rank=16, rank_pattern={"mid": 4, "attn2": 8})
    assert [config.rank_for(n) for n in ("mid.attn2", "up.attn2", "up.attn1")] == [4, 8, 16]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(rank=0), ValueError, "rank: expected at least 1, got 0"),
        (dict(rank=-3), ValueError, "rank: expected at least 1, got -3"),
        (dict(rank=4.0), TypeError, "rank: expected an integer, got 4.0"),
        (dict(rank=True), TypeError, "rank: expected an integer, got True"),
        (dict(activation="tanh"), ValueError, "activation: expected one of identity.*'tanh'"),
        (dict(design="lora"), ValueError, "design: expected one of bottleneck, .*, got 'lora'"),
        (dict(scale="1"), TypeError, "scale: expected a number, got '1'"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
        (dict(dropout=1.0), ValueError, "dropout: expected 0 <= p < 1, got 1.0"),
        (dict(dropout=-0.1), ValueError, "dropout: expected 0 <= p < 1, got -0.1"),
        (dict(drop_path=1), ValueError, "drop_path: expected 0 <= p < 1, got 1.0"),
        (dict(layer_norm=0), TypeError, "layer_norm: expected True or False, got 0"),
        (dict(time_window=5), TypeError, r"time_window: expected None or \(first, last\), got 5"),
        (dict(time_window=(1, "2")), TypeError, "time_window: expected a number, got '2'"),
        (dict(time_window=(2, 1)), ValueError, r"time_window: expected first <= last, got \(2"),
        (dict(time_rank=0), ValueError, "time_rank: expected at least 1, got 0"),
        (dict(time_rank=65), ValueError, "time_rank: expected at most the rank of 64, got 65"),
        (dict(train="all"), ValueError, "train: expected one of adapter, adapter.attention"),
        (dict(bias=1), TypeError, "bias: expected True or False, got 1"),
        (dict(targets="("), ValueError, r"targets: expected a regular expression, got '\('"),
        (dict(targets=()), TypeError, r"targets: expected None, a regular .* got \(\)"),
        (dict(targets=("a", 3)), TypeError, "targets: expected None, a regular"),
        (dict(targets=7), TypeError, "targets: expected None, a regular .* got 7"),
        (dict(rank_pattern=[4]), TypeError, "rank_pattern: expected a dict"),
        (dict(rank_pattern={"(": 4}), ValueError, "rank_pattern: expected a regular expression"),
        (dict(rank_pattern={"a": 0}), ValueError, r"rank_pattern\['a'\]: expected at least 1"),
        (dict(dtype="float32"), TypeError, "dtype: expected None or one of float16.*'float32'"),
        (dict(dtype=torch.int8), TypeError, "dtype: expected None or one of float16.*int8"),
    ],
)
def test_refuses(options, error, message):
    with pytest.raises(error, match=message):
        AdapterConfig(**options)


def test_from_dict_refuses():
    with pytest.raises(ValueError, match=r"config: expected keys of rank, .* got extra"):
        AdapterConfig.from_dict({"rank": 4, "extra": 1})
    with pytest.raises(TypeError, match="config: expected a dict, got 3"):
        AdapterConfig.from_dict(3)
    with pytest.raises(ValueError, match=r"dtype: expected one of float16.*'int8'"):
        AdapterConfig.from_dict({"dtype": "int8"})
