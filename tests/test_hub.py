"""Adapters from the Hub, which is not asked: a fake of its download stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import a3fta_kernels as a3fta
from a3fta_kernels import hub
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import adapted, load, output, snapshot


class Hub:
    """Repositories as folders of a place; `calls` are what was asked for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.calls: list[dict[str, Any]] = []

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, "filename": filename, **options})
        path = self.place / repo_id / (options["subfolder"] or "") / filename
        if not path.exists():
            raise LocalEntryNotFoundError(f"{filename} is not there\nand more lines")
        return str(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", found.download)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.mark.parametrize("layout", ["a3fta", "peft"])
@pytest.mark.parametrize("subfolder", [None, "last"])
def test_a_repository_in_the_place_of_a_folder(place: Hub, layout: str, subfolder: str | None):
    model = adapted()
    a3fta.save_adapter(model, place.place / "me/style" / (subfolder or ""), layout=layout)
    other = models.build("sd15")
    load(other, "me/style", subfolder=subfolder, revision="v1", token="secret")
    assert torch.equal(output(other), output(model))
    asked = {"repo_id": "me/style", "revision": "v1", "subfolder": subfolder, "token": "secret"}
    assert place.calls == [{**asked, "filename": f} for f in (WEIGHTS_NAME, CONFIG_NAME)]


def test_without_its_config_the_weights_are_enough(place: Hub):
    model = adapted()
    a3fta.save_adapter(model, place.place / "me/style")
    (place.place / "me/style" / CONFIG_NAME).unlink()
    other = models.build("sd15")
    with pytest.warns(UserWarning, match="is missing"):
        load(other, "me/style")
    assert torch.equal(output(other), output(model))


def test_a_folder_of_that_name_comes_first(place: Hub, tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path / "me/style/sub")
    load(models.build("sd15"), "me/style", subfolder="sub")
    load(models.build("sd15"), Path("me/style"), subfolder="sub")
    assert not place.calls


def test_what_is_not_there(place: Hub):
    model = models.build("sd15")
    before = snapshot(model)
    with pytest.raises(a3fta.AdapterFileError, match=r"me/none: expected a folder, .* \(adapter_"):
        load(model, "me/none")
    assert snapshot(model) == before
    with pytest.raises(a3fta.AdapterFileError, match="readable file"):
        load(model, Path("me/none"))  # a path is never a repository
    assert len(place.calls) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("me/style", True), ("me-2/style.v1_x", True), ("style", False), ("a/b/c", False),
        ("./style", False), ("../style", False), ("/me/style", False), ("me/", False),
        (Path("me/style"), False), ("me\\style", False), ("", False),
    ],
)  # fmt: skip
def test_names_of_repositories(name: Any, expected: bool):
    assert hub.is_repository(name) is expected
