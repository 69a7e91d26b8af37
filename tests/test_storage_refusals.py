"""Damaged, foreign and edited adapter files are refused, with the model untouched."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import adapted, refused, resigned, twin_edited

# a test that expects a warning of a load says so
pytestmark = pytest.mark.filterwarnings("error:.*adapter_config.json")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return a3fta.save_adapter(adapted(), tmp_path / "adapter")


def truncate(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:40])


def empty(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(b"")


def trailing(folder: Path) -> None:
    with open(folder / WEIGHTS_NAME, "ab") as file:
        file.write(b"more")


def flip_weight(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_NAME).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS_NAME).write_bytes(data)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()


def lora_file(folder: Path) -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_A.weight"
    save_file({key: torch.randn(4, 64)}, folder / WEIGHTS_NAME, {"format": "pt"})


def bare_file(folder: Path) -> None:
    save_file({"x": torch.randn(4)}, folder / WEIGHTS_NAME)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_NAME).write_bytes(pickle.dumps(Bomb()))


def torch_saved(folder: Path) -> None:
    torch.save({"x": torch.randn(4)}, folder / WEIGHTS_NAME)


def newer_version(folder: Path) -> None:
    resigned(folder, a3fta_format="2")


def newer_twin(folder: Path) -> None:
    twin_edited(folder, lambda twin: twin.update(a3fta_format=2))


def edited_rank(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": 2.0'))


def reordered_twin(folder: Path) -> None:
    twin_edited(folder, lambda t: t.update(config=dict(reversed(t["config"].items()))), sign=False)


def twin_of_another(folder: Path) -> None:
    twin_edited(folder, lambda twin: twin["config"].update(scale=3.0))


def twin_not_json(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("rank: 4")


def twin_is_a_list(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[1]")


def twin_nan(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"scale": 1.0', '"scale": NaN'))


def twin_doubled(folder: Path) -> None:
    path = folder / CONFIG_NAME
    path.write_text(path.read_text().replace('"rank": 4', '"rank": 4, "rank": 4'))


def twin_deep(folder: Path) -> None:
    (folder / CONFIG_NAME).write_text("[" * 100_000)


class Bomb:
    """Sets the flag if anything ever unpickles it."""

    went_off = False

    def __reduce__(self) -> Any:
        return setattr, (Bomb, "went_off", True)


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "whole tensors"),
    (truncate_header, "a safetensors file"),
    (empty, "a safetensors file"),
    (trailing, "whole tensors"),
    (flip_weight, "SHA-256"),
    (no_weights, "a readable file"),
    (lora_file, "an adapter saved by a3fta_kernels"),
    (bare_file, "an adapter saved by a3fta_kernels"),
    (pickled, "a safetensors file"),
    (torch_saved, "a safetensors file"),
    (newer_version, "format version '1'.*format version '2'; a newer a3fta-kernels"),
    (newer_twin, "format version 1.*format version 2"),
    (edited_rank, "SHA-256.*edited"),
    (reordered_twin, "SHA-256.*edited"),
    (twin_of_another, "the settings that adapter_model.safetensors holds"),
    (twin_not_json, "valid JSON"),
    (twin_is_a_list, "a JSON object, found list"),
    (twin_nan, "valid JSON, found the number NaN"),
    (twin_doubled, "valid JSON, found the key 'rank' twice"),
    (twin_deep, "valid JSON"),
]


@pytest.mark.parametrize("existing", [False, True], ids=["stock", "adapted"])
@pytest.mark.parametrize(("damage", "match"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damaged_and_foreign_files(
    damage: Callable[[Path], None], match: str, existing: bool, saved: Path
):
    damage(saved)
    model = adapted(seed=6) if existing else models.build("sd15")
    refused(model, saved, match)
    assert not Bomb.went_off


def test_a_folder_that_is_none(tmp_path: Path):
    refused(models.build("sd15"), tmp_path / "nowhere", "a readable file, found No such file")
    (tmp_path / "file").write_text("x")
    refused(models.build("sd15"), tmp_path / "file", "a readable file, found Not a directory")


def key_of(folder: Path, ending: str) -> str:
    return next(k for k in sorted(adapter_file.read(folder).tensors) if k.endswith(ending))


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


# edits whose checksums are right, as another program might write them
SIGNED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown config key": ({"config": {"colour": 1}}, "got colour"),
    "bad rank": ({"config": {"rank": 0}}, "rank: expected at least 1, got 0"),
    "boolean scale": ({"config": {"scale": True}}, "scale: expected a number"),
    "unknown activation": ({"config": {"activation": "selu"}}, "activation: expected one of"),
    "unknown design": ({"config": {"design": "lora"}}, "design: expected one of"),
    "bad regex": ({"config": {"targets": "("}}, "targets: expected a regular expression"),
    "bad dtype": ({"config": {"dtype": "int8"}}, "dtype: expected one of"),
    "another rank": ({"config": {"rank": 3}}, "w_down of shape|b_down of shape"),
    "huge rank": ({"config": {"rank": 10**15}}, "tensors of rank 1000000000000000, found"),
    "no bias": ({"config": {"bias": False}}, "no tensor .*b_down"),
    "other targets": ({"config": {"targets": "attn2"}}, "attn1.to_out.0 not adapted"),
    "targets of none": ({"config": {"targets": "nothing"}}, "targets: expected parts"),
    "another class": ({"base": {"model": "UNet2DModel"}}, "an adapter for a UNet2DConditionModel"),
    "a layer less": ({"base": {"layers": {}}}, "of shape 64x64"),
    "layers as text": ({"base": {"layers": "all"}}, "a base with model and layers"),
    "extra in base": ({"base": {"extra": 1}}, "a base with model and layers"),
    "samples as text": ({"samples": {"x": "y"}}, "samples of adapted layers"),
    "extra metadata": ({"note": "hello"}, "metadata with the keys"),
}


@pytest.mark.parametrize(("edit", "match"), SIGNED.values(), ids=SIGNED.keys())
def test_signed_but_wrong(edit: dict[str, Any], match: str, saved: Path):
    resigned(saved, **edit)
    refused(models.build("sd15"), saved, match)


TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor] | None, str]] = {
    "missing": ("w_up", None, r"a tensor .*w_up, found none"),
    "wrong shape": ("w_up", lambda t: t[:-1], r"w_up of shape \(64, 4\), found shape \(63, 4\)"),
    "transposed": ("w_up", lambda t: t.t(), r"w_up of shape \(64, 4\), found shape \(4, 64\)"),
    "integers": ("b_up", lambda t: t.int(), "a dtype of F16, BF16, F32, F64 for .*I32"),
    "float8": ("b_up", lambda t: t.to(torch.float8_e4m3fn), "a dtype of F16, BF16, F32, F64"),
    "too large": ("b_up", lambda t: t.double() * 1e300, "b_up in the range of torch.float32"),
}


@pytest.mark.parametrize("existing", [False, True], ids=["stock", "adapted"])
@pytest.mark.parametrize(("ending", "change", "match"), TENSORS.values(), ids=TENSORS.keys())
def test_signed_but_other_tensors(
    ending: str, change: Any, match: str, existing: bool, saved: Path
):
    key = key_of(saved, ending)
    edit = (lambda ts: ts.pop(key)) if change is None else replace(key, change)
    resigned(saved, tensors=edit)
    refused(adapted(seed=6) if existing else models.build("sd15"), saved, match)


def test_an_unknown_tensor(saved: Path):
    resigned(saved, tensors=lambda ts: ts.update({"mid_block.w_down": torch.zeros(2)}))
    refused(models.build("sd15"), saved, "no tensor mid_block.w_down, found it")
