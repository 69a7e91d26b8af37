"""docs/bases.md: its code runs, in order, on a small base; its launch lines are accelerate's."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch import nn

import a3fta_kernels as a3fta

from . import docs, models
from .integration.quantized import bitsandbytes_4bit, quantized


def load_in_4_bits(
    folder: str,
    subfolder: str,
    dtype: torch.dtype,
    quantization_config: diffusers.BitsAndBytesConfig,
) -> nn.Module:
    assert (folder, subfolder, dtype) == ("base", "unet", torch.bfloat16)
    assert quantization_config.load_in_4bit
    assert quantization_config.bnb_4bit_compute_dtype == dtype
    return quantized(bitsandbytes_4bit)


@pytest.mark.usefixtures("fresh_accelerate")
def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    models.build("sd15").save_pretrained(tmp_path / "base/unet")
    noisy, noise = torch.randn(2, 2, 4, 16, 16)
    batch = (noisy, torch.tensor([3, 500]), torch.randn(2, 7, 32), noise)
    names: dict[str, Any] = dict(
        zip(("noisy", "timestep", "text", "noise"), batch, strict=True), batches=[batch] * 4
    )
    if torch.cuda.is_available():
        pytest.skip("the small batch is on the CPU")
    page = docs.steps("docs/bases.md", tmp_path, monkeypatch, names)
    with monkeypatch.context() as patch:  # diffusers quantizes on a GPU alone
        patch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", load_in_4_bits)
        next(page)
    next(page)
    adapters = list(a3fta.trainable_parameters(names["unet"]))
    assert all(p.grad is not None for p in adapters)

    next(page)
    loaded = list(a3fta.trainable_parameters(names["unet"]))
    assert all(torch.equal(a, b) for a, b in zip(loaded, adapters, strict=True))
    with torch.no_grad():
        expected = names["unet"](*batch[:3]).sample
    next(page)
    compiled = [m for m in names["unet"].modules() if m._compiled_call_impl is not None]
    assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}
    for block in compiled:
        block._compiled_call_impl = None  # inductor's turn is in tests/integration
    with torch.no_grad():
        torch.testing.assert_close(names["unet"](*batch[:3]).sample, expected, rtol=1e-4, atol=1e-4)

    next(page)
    assert names["optimizer"].optimizer.state, "no step was taken"
    assert (tmp_path / "my-adapter-of-all/adapter_model.safetensors").is_file()
    assert next(page, None) is None


def test_its_launch_lines_are_known_to_accelerate():
    lines = "".join(code for _, code in docs.blocks("docs/bases.md", "bash")).splitlines()
    found = []
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["accelerate", "launch"]
        found.append(launch_command_parser().parse_args(words[2:]))
    assert all(launch.training_script == "train.py" for launch in found)
    assert [launch.multi_gpu for launch in found] == [True, False, False, True, True]
    assert found[1].use_fsdp and str(found[1].fsdp_version) == "2"
    named = found[1].fsdp_transformer_layer_cls_to_wrap
    assert named in {type(m).__name__ for m in models.build("sd15").modules()}
    assert found[2].use_deepspeed and found[2].zero_stage == 2
    assert [launch.machine_rank for launch in found[3:]] == [0, 1]
    assert {launch.num_machines for launch in found[3:]} == {2}
