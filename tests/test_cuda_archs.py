"""Which GPUs setup.py builds for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script(monkeypatch) -> dict[str, Any]:
    """setup.py's names, without its call of setuptools; a GPU of each given capability."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found: nothing is built for GPUs here")
    monkeypatch.delenv("A3FTA_CUDA_ARCHS", raising=False)
    text, _, _ = (ROOT / "setup.py").read_text().partition("\nsetup(")
    names: dict[str, Any] = {"__file__": str(ROOT / "setup.py"), "__name__": "script"}
    exec(compile(text, "setup.py", "exec"), names)
    return names


def gpus(monkeypatch, *capabilities):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])


def codes(script) -> list[str]:
    flags = script["Cuda"](shutil.which("nvcc")).gencode()
    return [x.partition("code=")[2] for x in flags if "code=" in x]


def test_all_where_there_is_no_gpu(script, monkeypatch):
    gpus(monkeypatch)
    everything = codes(script)
    assert {"sm_80", "compute_80", "sm_90a"} <= set(everything)
    monkeypatch.setenv("A3FTA_CUDA_ARCHS", "all")
    gpus(monkeypatch, (9, 0))
    assert codes(script) == everything


def test_the_gpus_that_are_here(script, monkeypatch):
    gpus(monkeypatch, (9, 0), (8, 6), (9, 0), (7, 5))
    assert codes(script) == ["sm_86", "sm_90a"]
    monkeypatch.setenv("A3FTA_CUDA_ARCHS", "80+PTX, 89")
    assert codes(script) == ["sm_80", "compute_80", "sm_89"]


@pytest.mark.parametrize("capability", [(7, 5), (99, 0)], ids=["too old", "unknown to nvcc"])
def test_a_gpu_that_nothing_can_be_built_for(script, monkeypatch, capability):
    gpus(monkeypatch, capability)
    assert "compute_80" in codes(script)


@pytest.mark.parametrize(
    ("asked", "told"), [("hopper", "names like 90a or 80.PTX: hopper"), ("999", "know sm_999")]
)
def test_what_is_no_architecture(script, monkeypatch, asked, told):
    monkeypatch.setenv("A3FTA_CUDA_ARCHS", asked)
    with pytest.raises(RuntimeError, match=told):
        codes(script)
