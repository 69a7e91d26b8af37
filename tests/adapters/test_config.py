"""AdapterConfig: defaults, the way to JSON and back, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

from a3fta_kernels.adapters import AdapterConfig

FULL = AdapterConfig(
    rank=8, activation="silu", scale=0.5, bias=False, dropout=0.1, targets=("attn1", "mid_block"),
    rank_pattern={"mid": 4}, dtype=torch.bfloat16,
)  # fmt: skip


@pytest.mark.parametrize("config", [AdapterConfig(), FULL, AdapterConfig(targets="attn1$")])
def test_survives_json(config):
    assert AdapterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


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
        (
            dict(design="lora"),
            ValueError,
            "design: expected one of bottleneck, gated, scaled, film, time_scaled, got 'lora'",
        ),
        (dict(scale="1"), TypeError, "scale: expected a number, got '1'"),
        (dict(scale=float("nan")), ValueError, "scale: expected a finite number, got nan"),
        (dict(dropout=1.0), ValueError, "dropout: expected 0 <= p < 1, got 1.0"),
        (dict(dropout=-0.1), ValueError, "dropout: expected 0 <= p < 1, got -0.1"),
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
