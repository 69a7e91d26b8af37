"""What a file tells of where it comes from; the weights that it compares: test_storage.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models
from .adapter_files import adapted, header_of, load, output, refused, twin_edited


def told(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_NAME).read_text())["about"]


def test_a_file_tells_where_it_comes_from(tmp_path: Path):
    model = adapted("flux")
    model.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    a3fta.save_adapter(model, tmp_path, training={"steps": 200, "learning_rate": 5e-4})
    assert told(tmp_path) == {
        "family": "flux",
        "base": "black-forest-labs/FLUX.1-dev",
        "versions": told(tmp_path)["versions"],
        "training": {"steps": 200, "learning_rate": 5e-4},
    }
    versions = told(tmp_path)["versions"]
    assert versions["torch"] == torch.__version__
    assert versions["diffusers"] == diffusers.__version__
    assert json.loads(header_of(tmp_path)["__metadata__"]["about"]) == told(tmp_path)
    assert adapter_file.read(tmp_path).about == told(tmp_path)


@pytest.mark.parametrize("name", ["/home/me/model", "", None])
def test_a_path_of_this_machine_stays_here(name: str | None, tmp_path: Path):
    model = adapted()
    model.register_to_config(_name_or_path=name)
    a3fta.save_adapter(model, tmp_path)
    assert told(tmp_path)["base"] is None and "training" not in told(tmp_path)


def test_a_folder_here_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    model = adapted()
    model.register_to_config(_name_or_path="runs/base")
    a3fta.save_adapter(model, "adapter")
    assert told(tmp_path / "adapter")["base"] is None


@pytest.mark.parametrize("training", [{"a": torch.ones(1)}, {"a": float("nan")}, {"a": {1, 2}}])
def test_training_of_no_jsons_types(training: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match="training: expected settings of JSON's types"):
        a3fta.save_adapter(adapted(), tmp_path, training=training)
    with pytest.raises(TypeError, match="training: expected a dict"):
        a3fta.save_adapter(adapted(), tmp_path, training=[1])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_of_before_loads(tmp_path: Path):
    """Files of this version's first days tell nothing."""
    model = adapted()
    a3fta.save_adapter(model, tmp_path)
    file = adapter_file.read(tmp_path)
    metadata = header_of(tmp_path)["__metadata__"]
    del metadata["about"], metadata["sha256"]
    metadata["sha256"] = adapter_file._digest(file.tensors, metadata)
    (tmp_path / WEIGHTS_NAME).write_bytes(adapter_file.serialize(file.tensors, metadata))
    twin_edited(tmp_path, lambda twin: None)  # signed for these weights
    twin = json.loads((tmp_path / CONFIG_NAME).read_text())
    del twin["about"], twin["sha256"]
    twin["sha256"] = adapter_file._twin_digest(twin)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(twin))
    other = models.build("sd15")
    load(other, tmp_path)
    assert torch.equal(output(other), output(model))


def test_what_is_told_is_signed(tmp_path: Path):
    a3fta.save_adapter(adapted(), tmp_path, training={"steps": 1})
    twin_edited(tmp_path, lambda twin: twin["about"].update(base="me/mine"))
    refused(models.build("sd15"), tmp_path, "the settings that adapter_model.safetensors holds")


def test_pipelines_save_and_load(tmp_path: Path):
    for name, part in (("sd15", "unet"), ("flux", "transformer")):
        model = adapted(name)
        a3fta.save_adapter(SimpleNamespace(components={}, **{part: model}), tmp_path / name)
        pipe = SimpleNamespace(components={}, **{part: models.build(name)})
        load(pipe, tmp_path / name)
        assert torch.equal(output(getattr(pipe, part), name), output(model, name))
