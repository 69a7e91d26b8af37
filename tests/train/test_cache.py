"""The cache gives back what was made, and makes again whatever is not whole."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from a3fta_kernels.train import checkpoints
from a3fta_kernels.train.cache import Cache
from a3fta_kernels.train.errors import TrainingError

ROOT = Path(__file__).resolve().parents[2]
KEY = {"photo": "ab12", "size": [8, 16], "vae": "x", "step": 3}


class Maker:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        generator = torch.Generator().manual_seed(7)
        return {
            "mean": torch.randn(4, 8, 2, generator=generator).bfloat16(),
            "turned": torch.randn(3, 5, generator=generator).T,
            "spread": torch.ones(()).expand(2, 3),
            "ids": torch.arange(6),
            "none": torch.zeros(0, 4),
        }


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and tensor.device.type == "cpu"
        assert torch.equal(tensor, expected[name]), name


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_an_entry_is_made_once(tmp_path):
    make = Maker()
    first = Cache(tmp_path / "a" / "b").get(KEY, make)
    again = Cache(tmp_path / "a" / "b").get(dict(reversed(KEY.items())), make)
    assert make.calls == 1
    assert_same(first, Maker()())
    assert_same(again, first)
    assert [p.suffix for p in (tmp_path / "a" / "b").iterdir()] == [".safetensors"]


def test_what_comes_back_has_memory_of_its_own(tmp_path):
    tensors = {"x": torch.zeros(3)}
    for cache in (Cache(tmp_path), Cache(None)):
        cache.get(KEY, lambda: tensors)["x"] += 1
        assert torch.equal(tensors["x"], torch.zeros(3))


@pytest.mark.parametrize(
    "other",
    [{**KEY, "step": 4}, {**KEY, "step": "3"}, {**KEY, "more": None}, {"photo": "ab12"}],
)
def test_every_part_of_the_key_counts(tmp_path, other):
    make = Maker()
    cache = Cache(tmp_path)
    cache.get(KEY, make)
    cache.get(other, make)
    assert make.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_without_a_folder_nothing_is_kept():
    make = Maker()
    cache = Cache(None)
    cache.get(KEY, make)
    assert_same(cache.get(KEY, make), Maker()())
    assert make.calls == 2


def test_a_damaged_entry_is_made_again(tmp_path, caplog):
    Cache(tmp_path).get(KEY, Maker())
    path = entry(tmp_path)
    whole = path.read_bytes()
    damages = [whole[:n] for n in (0, 5, 8, 30, len(whole) // 2, len(whole) - 1)]
    damages += [b"text", b"\0" * 64, whole + b"\0", bytes([*whole[:-1], whole[-1] ^ 1])]
    for place in range(0, len(whole), 7):
        damages.append(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    for blob in damages:
        path.write_bytes(blob)
        caplog.clear()
        make = Maker()
        with caplog.at_level(logging.WARNING, "a3fta_kernels"):
            assert_same(Cache(tmp_path).get(KEY, make), Maker()())
        assert make.calls == 1, blob[:80]
        assert "made again" in caplog.text and path.name in caplog.text
        assert len(list(tmp_path.iterdir())) == 1
    assert_same(Cache(tmp_path).get(KEY, make), Maker()())
    assert make.calls == 1


def test_a_foreign_file_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    cache.get(KEY, Maker())
    path = entry(tmp_path)
    cache.get({"other": 1}, lambda: {"mean": torch.zeros(1)})
    (other,) = set(tmp_path.iterdir()) - {path}
    make = Maker()
    os.replace(other, path)  # whole, but of another key
    assert_same(cache.get(KEY, make), Maker()())
    save_file({"mean": torch.zeros(1)}, path)
    assert_same(cache.get(KEY, make), Maker()())
    assert make.calls == 2


def test_a_folder_in_the_way_is_said(tmp_path):
    cache = Cache(tmp_path)
    cache.get(KEY, Maker())
    path = entry(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(TrainingError, match=f"{tmp_path} cannot be written"):
        cache.get(KEY, Maker())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk(tmp_path, monkeypatch, number, place):
    def full(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, place, full)
    with pytest.raises(TrainingError, match=f"{tmp_path} cannot be written: .*make room"):
        Cache(tmp_path).get(KEY, Maker())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    import builtins

    real = builtins.open

    def redirected(path, *args, **options):
        return real("/dev/full", "wb") if str(path).endswith(".tmp") else real(path, *args)

    monkeypatch.setattr(builtins, "open", redirected)
    with pytest.raises(TrainingError, match=r"No space left.*make room"):
        Cache(tmp_path).get(KEY, Maker())


def test_a_place_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="cannot be written"):
        Cache(tmp_path / "file")


def test_an_error_of_the_maker_leaves_nothing(tmp_path):
    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Cache(tmp_path).get(KEY, fails)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from a3fta_kernels.train.cache import Cache

at, folder = sys.argv[1:]
setattr(os, at, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
Cache(Path(folder)).get({"photo": 1}, lambda: {"x": torch.arange(1000)})
"""


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_killed_while_it_writes(tmp_path, at):
    done = subprocess.run([sys.executable, "-c", KILLED, at, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    assert entry(tmp_path).suffix == ".tmp"
    checkpoints.tidy(tmp_path)  # as a run does that owns the folder
    found = Cache(tmp_path).get({"photo": 1}, lambda: {"x": torch.arange(1000)})
    assert torch.equal(found["x"], torch.arange(1000))
    assert entry(tmp_path).suffix == ".safetensors"
