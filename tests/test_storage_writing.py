"""Saving is atomic: whatever interrupts it, an adapter that loads is in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import adapted, load, output

ROOT = Path(__file__).resolve().parents[1]
# a test that expects a warning of a load says so
pytestmark = pytest.mark.filterwarnings("error:.*adapter_config.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a3fta.save_adapter(adapted(), tmp_path / "adapter")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_replaces_the_adapter_and_keeps_other_files(saved: Path):
    (saved / "README.md").write_text("mine")
    a3fta.save_adapter(adapted(seed=7, rank=2), saved)
    assert set(files(saved)) == {WEIGHTS_NAME, CONFIG_NAME, "README.md"}
    other = models.build("sd15")
    assert load(other, saved).rank == 2
    assert torch.equal(output(other), output(adapted(seed=7, rank=2)))


def test_the_same_adapter_gives_the_same_bytes(saved: Path, tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path / "again")
    assert files(tmp_path / "again") == files(saved)


@pytest.mark.parametrize("failing", ["first write", "second write", "first rename"])
def test_an_error_while_saving_leaves_the_old_adapter(
    failing: str, saved: Path, monkeypatch: pytest.MonkeyPatch
):
    before = files(saved)
    full = OSError(28, "No space left on device")
    calls = []

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == (2 if failing == "second write" else 1):
            raise full
        return real(*args, **options)

    target = "replace" if failing == "first rename" else "fsync"
    real = getattr(os, target)
    monkeypatch.setattr(adapter_file.os, target, fail)
    with pytest.raises(OSError, match="No space left"):
        a3fta.save_adapter(adapted(seed=7), saved)
    monkeypatch.undo()
    assert calls and files(saved) == before
    other = models.build("sd15")
    load(other, saved)
    assert torch.equal(output(other), output(adapted()))


def test_an_error_between_the_two_renames(saved: Path, monkeypatch: pytest.MonkeyPatch):
    """The weights file is the newer one, and stands alone."""
    real, calls = os.replace, []

    def cut(source: Any, target: Any) -> None:
        calls.append(Path(target).name)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    old_config = (saved / CONFIG_NAME).read_bytes()
    monkeypatch.setattr(adapter_file.os, "replace", cut)
    with pytest.raises(OSError, match="Input/output"):
        a3fta.save_adapter(adapted(seed=7, rank=2), saved)
    monkeypatch.undo()
    assert calls == [WEIGHTS_NAME, CONFIG_NAME]
    assert set(files(saved)) == {WEIGHTS_NAME, CONFIG_NAME}
    assert (saved / CONFIG_NAME).read_bytes() == old_config
    other = models.build("sd15")
    with pytest.warns(UserWarning, match="describes other weights"):
        assert load(other, saved).rank == 2
    assert torch.equal(output(other), output(adapted(seed=7, rank=2)))


KILLED = """
import os, sys
from pathlib import Path
from a3fta_kernels import adapter_file

folder, step = Path(sys.argv[1]), int(sys.argv[2])
file = adapter_file.read(folder)
calls = []
real = os.replace

def replace(source, target):
    calls.append(target)
    if len(calls) == step:
        os._exit(9)  # nothing is cleaned up, as after a SIGKILL
    real(source, target)

os.replace = replace
tensors = {key: tensor * 0 + 0.25 for key, tensor in file.tensors.items()}
adapter_file.write(folder, tensors, file.config, file.base, file.samples, "0")
"""


@pytest.mark.parametrize("step", [1, 2])
def test_killed_before_a_rename(step: int, saved: Path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(saved), str(step)], cwd=ROOT)
    assert done.returncode == 9
    model = models.build("sd15")
    if step == 1:
        load(model, saved)
        assert torch.equal(output(model), output(adapted()))
        return
    with pytest.warns(UserWarning, match="describes other weights"):
        load(model, saved)
    assert all(bool((p == 0.25).all()) for p in a3fta.trainable_parameters(model))
    a3fta.save_adapter(model, saved)
    load(models.build("sd15"), saved)  # without a warning again


def test_a_missing_twin_is_a_warning(saved: Path):
    (saved / CONFIG_NAME).unlink()
    model = models.build("sd15")
    with pytest.warns(UserWarning, match="adapter_config.json is missing"):
        load(model, saved)
    assert torch.equal(output(model), output(adapted()))


def test_white_space_in_the_twin_does_not_count(saved: Path):
    path = saved / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7) + "\n\n")
    load(models.build("sd15"), saved)


def test_saving_into_a_read_only_place(saved: Path, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        a3fta.save_adapter(adapted(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_file_modes_follow_the_umask(tmp_path: Path):
    before = os.umask(0o027)
    try:
        a3fta.save_adapter(adapted(), tmp_path / "new")
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {0o640}
