"""A3FTAConfig: its checks, and the way to an AdapterConfig and back."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels.peft import A3FTAConfig
from a3fta_kernels.peft_file import SAME

from .common import stock

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
    ({"rank": "4"}, TypeError, "rank: expected an integer"),
    ({"activation": "tanh"}, ValueError, "activation: .*tanh"),
    ({"design": "other"}, ValueError, "design: .*other"),
    ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    ({"dropout": 1.0}, ValueError, "dropout: expected 0 <= p < 1"),
    ({"use_bias": "none"}, TypeError, "use_bias: expected True or False"),
    ({"bias": "none"}, TypeError, "unexpected keyword argument 'bias'"),
    ({"target_modules": []}, TypeError, "target_modules: expected None, a regular"),
    ({"target_modules": ["a", 1]}, TypeError, "target_modules: expected None, a regular"),
    ({"target_modules": "("}, ValueError, "target_modules: expected a regular expression"),
    ({"rank_pattern": ["a"]}, TypeError, "rank_pattern: expected a dict"),
    ({"rank_pattern": {"(": 2}}, ValueError, "rank_pattern: expected a regular expression"),
    ({"rank_pattern": {"a": 0}}, ValueError, "rank_pattern.*at least 1"),
    ({"dtype": "int8"}, ValueError, "dtype: .*int8"),
    ({"dtype": torch.int8}, ValueError, "dtype: .*int8"),
    ({"backend": "cuda"}, ValueError, "backend: .*cuda"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD, ids=lambda x: str(x)[:40])
def test_bad_settings(options: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        A3FTAConfig(**options)


def test_every_setting_of_an_adapter_is_there():
    own = {f.name for f in dataclasses.fields(A3FTAConfig)}
    names = {f.name for f in dataclasses.fields(a3fta.AdapterConfig)}
    other = {"bias", "dtype", "rank_pattern", "targets", "train"}
    assert names == {*SAME, *other} and not other & set(SAME)
    assert own >= {*SAME, "use_bias", "target_modules", "rank_pattern", "dtype"}


def test_training_attention_too_is_for_inject():
    config = a3fta.AdapterConfig(train="adapter+attention")
    with pytest.raises(ValueError, match="train='adapter', as in PEFT"):
        A3FTAConfig.from_adapter_config(config)


CONFIGS = [
    {},
    {"rank": 3, "activation": "identity", "scale": 0.5, "bias": False, "dropout": 0.25},
    {"design": "gated", "dtype": torch.bfloat16},
    {"layer_norm": True, "drop_path": 0.1, "time_window": (0.0, 500.0), "time_rank": 2},
    {"rank_pattern": {"^down": 2, r"attn1|up_blocks\.0": 3, "0$": 5}},
    {"targets": ("attn2", "mid_block")},
    {"placement": "parallel", "targets": ("attn1",)},
    {"targets": r"^up.*attn1"},
]


@pytest.mark.parametrize("options", CONFIGS, ids=str)
def test_there_and_back(options: dict[str, Any]):
    """The same settings, the same layers and the same rank on each of them."""
    model = stock("sd15")
    config = a3fta.AdapterConfig(**options)
    there = A3FTAConfig.from_adapter_config(config, model)
    back = there.to_adapter_config()
    same = {*SAME, "bias", "dtype"}
    assert all(getattr(back, f) == getattr(config, f) for f in same)
    json.dumps(there.to_dict())

    ranks = {}
    for kind, one in (("first", config), ("back", back)):
        other = stock("sd15")
        a3fta.inject(other, one)
        ranks[kind] = {n: p.adapters["default"].rank for n, p in a3fta.projections(other).items()}
    model.add_adapter(there, adapter_name="x")
    ranks["peft"] = {
        name: module.r["x"] for name, module in model.named_modules() if hasattr(module, "r")
    }
    assert ranks["first"] == ranks["back"] == ranks["peft"] and ranks["first"]


@pytest.mark.parametrize(
    "targets",
    [
        ["to_out.0"],
        r".*attn1\.to_out\.0",
        ["mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"],
    ],
    ids=str,
)
def test_pefts_rule_for_targets_is_kept(targets: Any):
    model, other = stock("sd15"), stock("sd15")
    config = A3FTAConfig(target_modules=targets, rank_pattern={"attn1.to_out.0": 3})
    a3fta.inject(other, config.to_adapter_config())
    model.add_adapter(config, adapter_name="x")
    found = {name: module.r["x"] for name, module in model.named_modules() if hasattr(module, "r")}
    assert found == {n: p.adapters["default"].rank for n, p in a3fta.projections(other).items()}
    assert set(found.values()) <= {3, 64}


def test_targets_want_their_model():
    config = a3fta.AdapterConfig(targets=("attn2",))
    with pytest.raises(ValueError, match="model: expected the model whose layers"):
        A3FTAConfig.from_adapter_config(config)
    with pytest.raises(TypeError, match="config: expected an AdapterConfig"):
        A3FTAConfig.from_adapter_config({"rank": 4})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets: expected parts of the names"):
        A3FTAConfig.from_adapter_config(a3fta.AdapterConfig(targets=("no",)), stock("sd15"))


def test_it_is_saved_and_read_by_peft(tmp_path: Path):
    options = {"backend": "reference", "target_modules": {"b", "a"}}
    config = A3FTAConfig(rank=3, dtype=torch.float32, **options)
    config.save_pretrained(str(tmp_path))
    assert not re.search("backend|reference", (tmp_path / "adapter_config.json").read_text())
    again = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(again, A3FTAConfig) and again.peft_type == peft.PeftType.A3FTA
    assert (again.rank, again.dtype, again.backend) == (3, "float32", "auto")
    assert sorted(again.target_modules) == ["a", "b"]
