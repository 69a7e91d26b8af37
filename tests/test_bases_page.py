"""docs/bases.md: its code runs, in order, on a small base; its launch lines are accelerate's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState

import a3fta_kernels as a3fta

from . import models
from .integration.quantized import bitsandbytes_4bit, quantized

PAGE = (Path(__file__).parents[1] / "docs/bases.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def no_accelerator_left() -> Iterator[None]:
    """What `Accelerator()` keeps for the process would decide for later tests."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    models.build("sd15").save_pretrained("base/unet")
    noisy, noise = torch.randn(2, 2, 4, 16, 16)
    batch = (noisy, torch.tensor([3, 500]), torch.randn(2, 7, 32), noise)
    names: dict[str, Any] = dict(
        zip(("noisy", "timestep", "text", "noise"), batch, strict=True), batches=[batch] * 4
    )
    load, train, offload, compile_, accelerate = blocks("python")
    if torch.cuda.is_available():
        pytest.skip("the small batch is on the CPU")
    imports, _, loading = load.partition("\n\nunet = ")
    exec(imports, names)
    assert "BitsAndBytesConfig" in loading  # diffusers loads it on a GPU alone
    names["unet"] = quantized(bitsandbytes_4bit)
    exec(train, names)
    adapters = list(a3fta.trainable_parameters(names["unet"]))
    assert all(p.grad is not None for p in adapters)

    exec(offload, names)
    loaded = list(a3fta.trainable_parameters(names["unet"]))
    assert all(torch.equal(a, b) for a, b in zip(loaded, adapters, strict=True))
    with torch.no_grad():
        expected = names["unet"](*batch[:3]).sample
    exec(compile_, names)
    compiled = [m for m in names["unet"].modules() if m._compiled_call_impl is not None]
    assert {type(m).__name__ for m in compiled} == {"BasicTransformerBlock"}
    for block in compiled:
        block._compiled_call_impl = None  # inductor's turn is in tests/integration
    with torch.no_grad():
        torch.testing.assert_close(names["unet"](*batch[:3]).sample, expected, rtol=1e-4, atol=1e-4)

    exec(accelerate, names)
    assert names["optimizer"].optimizer.state, "no step was taken"
    assert Path("my-adapter-of-all/adapter_model.safetensors").is_file()


def test_its_launch_lines_are_known_to_accelerate():
    lines = "".join(blocks("bash")).splitlines()
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
