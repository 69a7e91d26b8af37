"""Bases of 4 bits in the recipe: what is packed, what trains on it, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import a3fta_kernels as a3fta
from a3fta_kernels.train import Settings, TrainingError, finetune, packing, records, sample
from a3fta_kernels.train.families import load
from tests import models
from tests.train import runs_on_disk as runs
from tests.train.families import common

pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
CPU = torch.device("cpu")


def packed_unet(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """A small U-Net, and the same packed."""
    pair = [models.build("sd15", dtype=dtype).requires_grad_(False) for _ in range(2)]
    pair[1].load_state_dict(pair[0].state_dict())
    packing.pack(pair[1], "nf4", CPU)
    return pair[0], pair[1]


def test_every_plain_linear_layer_is_packed_and_nothing_else():
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain, packed = packed_unet()
    there = dict(packed.named_modules())
    linear = {n: m for n, m in plain.named_modules() if type(m) is nn.Linear}
    assert linear and {n for n, m in there.items() if type(m) is Linear4bit} == set(linear)
    for name, layer in linear.items():
        weight = there[name].weight
        assert weight.dtype == torch.uint8 and weight.nbytes == layer.weight.numel() // 2
        assert weight.quant_state.quant_type == "nf4" and weight.quant_state.nested
        error = (dequantize_4bit(weight.data, weight.quant_state) - layer.weight).norm()
        assert 0 < error < 0.12 * layer.weight.norm()
        assert there[name].training == layer.training
    others = {n: p for n, p in plain.named_parameters() if n not in {f"{k}.weight" for k in linear}}
    found = dict(packed.named_parameters())
    assert all(torch.equal(found[name], p) for name, p in others.items())
    assert not any(p.requires_grad for p in packed.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_trains_after_it_was_evaluated(dtype):
    """bitsandbytes packs for a CPU with bf16 products once more when it evaluates."""
    _, model = packed_unet(dtype)
    a3fta.inject(model, a3fta.AdapterConfig(rank=4, placement="parallel"))
    models.randomize(model)
    with torch.no_grad():
        before = models.run(model.eval(), "sd15", dtype=dtype)
    models.run(model.train(), "sd15", dtype=dtype).float().square().mean().backward()
    parameters = list(a3fta.trainable_parameters(model))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
    # the last layer's alone would not need what the trunk hands back
    assert sum(bool(p.grad.any()) for p in parameters) == len(parameters)
    with torch.no_grad():
        assert torch.equal(models.run(model.eval(), "sd15", dtype=dtype), before)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small pipeline and three photos."""
    made = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            common.PIPELINES[name](made[name])
            runs.write_photos(made[name], 3, side=32)
        return made[name]

    return folder


def settings(folder: Path, output: Path, **changes) -> Settings:
    plain = {
        "quantize": "nf4", "heldout": "none", "evaluate_every": 0, "sample_every": 2, "steps": 2,
        "sample_count": 1, "sample_steps": 1, "resolution": 32, "trigger": "a dog",
    }  # fmt: skip
    return replace(runs.settings(folder, **(plain | changes)), output=str(output))


@pytest.mark.parametrize(
    ("name", "precision", "lean"),
    [("sdxl", "no", "exact"), ("sd", "bf16", "block"), ("sd3", "no", "recompute"),
     ("flux", "bf16", "block"), ("z_image", "bf16", "block")],
)  # fmt: skip
def test_a_run_on_a_packed_base(base, tmp_path, name, precision, lean):
    asked = settings(base(name), tmp_path / "run", mixed_precision=precision, lean=lean)
    adapter = finetune(asked)
    losses = [entry["loss"] for entry in records.read(tmp_path / "run", records.LOG)]
    finetune(replace(asked, quantize="no", output=str(tmp_path / "plain")))
    whole = [entry["loss"] for entry in records.read(tmp_path / "plain", records.LOG)]
    assert losses != whole and losses == pytest.approx(whole, rel=0.05)
    assert "| quantize | `nf4` |" in (adapter / "README.md").read_text()
    # it goes on one of 4 bits, and on the whole one
    pages = [
        sample(
            asked.model, [(str(adapter), 1.0)], ["a dog"], count=1, steps=1, resolution=32,
            quantize=quantize,
        )
        for quantize in ("nf4", "no")
    ]  # fmt: skip
    assert pages[0].tobytes() != pages[1].tobytes()


def test_a_run_goes_on_with_the_base_it_began_with(base, tmp_path):
    asked = settings(base("sd"), tmp_path / "run", sample_every=0, checkpoint_every=1)
    finetune(asked)
    with pytest.raises(TrainingError, match="quantize was 'nf4', is 'no'"):
        finetune(replace(asked, steps=4, resume=True, quantize="no"))
    finetune(replace(asked, steps=4, resume=True))
    log = records.read(tmp_path / "run", records.LOG)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    finetune(replace(asked, steps=4, output=str(tmp_path / "unbroken")))
    assert [e["loss"] for e in log] == [
        e["loss"] for e in records.read(tmp_path / "unbroken", records.LOG)
    ]


def test_a_missing_package_is_told_before_a_model_is_read(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    asked = settings(base("sd"), tmp_path / "run", model="/nowhere")
    with pytest.raises(TrainingError, match="quantize: nf4 needs bitsandbytes: pip install"):
        finetune(asked)
    with pytest.raises(TrainingError, match="quantize: nf4 needs bitsandbytes: pip install"):
        sample("/nowhere", [], [], quantize="nf4")
    assert not (tmp_path / "run").exists()
    model = load(str(base("sd") / "pipeline"), torch.float32).denoiser
    packing.pack(model, "no", CPU)  # needs nothing, does nothing
    assert not any(p.dtype == torch.uint8 for p in model.parameters())
