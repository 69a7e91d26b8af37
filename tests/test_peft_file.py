"""One adapter in both layouts: what PEFT saved loads here, and the other way round."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import a3fta_kernels as a3fta
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from a3fta_kernels.peft import A3FTAConfig

from . import models
from .adapter_files import adapted, load, output, refused

OPTIONS: list[dict[str, Any]] = [
    {"rank": 3, "activation": "silu", "scale": 0.25, "bias": False, "dropout": 0.5},
    {"design": "gated", "targets": ("attn2",), "dtype": torch.float64},
    {"rank_pattern": {"up_blocks": 1, "attn1": 6}},
    {"placement": "post"},
    {"placement": "parallel", "rank_pattern": {"attn1": 6}},
]


def by_peft(name: str, folder: Path) -> Any:
    """The model with the folder's adapter by PEFT, on the reference backend."""
    with warnings.catch_warnings():  # of keys that its config does not know
        warnings.filterwarnings("error", "Unexpected keyword")
        model = peft.PeftModel.from_pretrained(models.build(name), str(folder))
    for module in model.modules():
        if hasattr(module, "a3fta_adapters"):
            module.backend = "reference"
    return model


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ours_loads_in_peft_and_comes_back(options: dict[str, Any], tmp_path: Path):
    model = adapted(**options)
    a3fta.save_adapter(model, tmp_path / "peft", layout="peft")
    wrapped = by_peft("sd15", tmp_path / "peft")
    assert torch.equal(output(wrapped), output(model))

    wrapped.save_pretrained(tmp_path / "again")
    other = models.build("sd15")
    config = load(other, tmp_path / "again")
    assert torch.equal(output(other), output(model))
    fields = {"activation": "gelu", "scale": 1.0, "design": "bottleneck", "bias": True}
    assert {f: getattr(config, f) for f in fields} == fields | {
        k: v for k, v in options.items() if k in fields
    }
    ranks = [
        {n: p.adapters["default"].rank for n, p in a3fta.projections(m).items()}
        for m in (model, other)
    ]
    assert ranks[0] == ranks[1]
    dtypes = [{p.dtype for p in a3fta.trainable_parameters(m)} for m in (model, other)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_families_with_columns_and_depth(name: str, tmp_path: Path):
    model = adapted(name)
    a3fta.save_adapter(model, tmp_path, layout="peft")
    assert torch.equal(output(by_peft(name, tmp_path), name), output(model, name))
    other = models.build(name)
    load(other, tmp_path)
    assert torch.equal(output(other, name), output(model, name))


def test_what_peft_adapted_is_saved_in_both_layouts(tmp_path: Path):
    model = models.build("sd15")
    model.add_adapter(A3FTAConfig(rank=4, backend="reference"), adapter_name="style")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(generator=generator)
    a3fta.save_adapter(model, tmp_path / "a3fta", "style")
    a3fta.save_adapter(model, tmp_path / "peft", "style", layout="peft")
    for folder in ("a3fta", "peft"):
        other = models.build("sd15")
        load(other, tmp_path / folder)
        assert torch.equal(output(other), output(model))
    load(models.build("sd15"), tmp_path / "peft")
    # ours of that name counts before PEFT's
    a3fta.inject(model, a3fta.AdapterConfig(rank=2), "style")
    a3fta.save_adapter(model, tmp_path / "ours", "style")
    assert load(models.build("sd15"), tmp_path / "ours").rank == 2
    with pytest.raises(ValueError, match="name: expected adapters that the model has"):
        a3fta.save_adapter(model, tmp_path, "other")


def test_an_adapter_that_is_there_takes_the_weights(tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path, layout="peft")
    other = adapted(seed=9)
    load(other, tmp_path)
    assert torch.equal(output(other), output(adapted()))
    refused(adapted(rank=5), tmp_path, "b_down of shape")
    refused(adapted(activation="relu"), tmp_path, "activation='relu'")
    refused(adapted(targets=("attn1",)), tmp_path, "not adapted")


def edited(folder: Path, **values: Any) -> None:
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({key.replace(old, new): t for key, t in tensors.items()}, folder / WEIGHTS_NAME)


BAD = {
    "another method": (lambda f: edited(f, peft_type="LORA"), "peft_type 'A3FTA'.*'LORA'"),
    "an unknown setting": (lambda f: edited(f, gates=3), "settings of a A3FTA adapter.*gates"),
    "a bad setting": (lambda f: edited(f, scale="big"), "valid config.*scale"),
    "other layers": (lambda f: renamed(f, "mid_block", "middle"), "middle"),
    "a LoRA's tensors": (lambda f: renamed(f, "a3fta_adapters.w_down", "lora_A"), "A3FTA adapter"),
    "a missing tensor": (lambda f: renamed(f, ".b_up", ".b_in"), "b_in|b_up"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), "a readable file"),
    "cut weights": (
        lambda f: (f / WEIGHTS_NAME).write_bytes((f / WEIGHTS_NAME).read_bytes()[:-4]),
        "whole tensors",
    ),
    "nothing in it": (lambda f: save_file({}, f / WEIGHTS_NAME), "none"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_refused(case: str, tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path, layout="peft")
    damage, match = BAD[case]
    damage(tmp_path)
    refused(models.build("sd15"), tmp_path, match)


def test_an_unknown_layout_and_an_interrupted_save(tmp_path: Path, monkeypatch: Any):
    model = adapted()
    with pytest.raises(ValueError, match=r"layout: .*a3fta.*peft"):
        a3fta.save_adapter(model, tmp_path, layout="lora")
    with pytest.raises(ValueError, match="training: expected None beside layout='peft'"):
        a3fta.save_adapter(model, tmp_path, layout="peft", training={"steps": 1})
    assert not list(tmp_path.iterdir())
    a3fta.save_adapter(model, tmp_path, layout="peft")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError("no space")

    models.randomize(model, seed=8)
    monkeypatch.setattr("a3fta_kernels.adapter_file.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        a3fta.save_adapter(model, tmp_path, layout="peft")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
