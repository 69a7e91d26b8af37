"""What the storage tests share: small adapted models, changed files, a picture of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

import a3fta_kernels as a3fta
from a3fta_kernels import adapter_file
from a3fta_kernels.adapter_file import CONFIG_NAME, WEIGHTS_NAME

from . import models


def adapted(name: str = "sd15", seed: int = 2, **options: Any) -> nn.Module:
    """A small model whose adapter has weights, on the reference backend."""
    model = models.build(name)
    a3fta.inject(model, a3fta.AdapterConfig(**{"rank": 4, **options}), backend="reference")
    models.randomize(model, seed=seed)
    return model


def output(model: nn.Module, name: str = "sd15") -> Tensor:
    with torch.no_grad():
        return models.run(model, name)


def load(model: Any, folder: Path, *args: Any, **options: Any) -> a3fta.AdapterConfig:
    return a3fta.load_adapter(model, folder, *args, **{"backend": "reference", **options})


def refused(model: Any, folder: Path, match: str, *args: Any, **options: Any) -> None:
    """The load fails with `match`, and the model is as it was."""
    root = getattr(model, "unet", model)
    before = snapshot(root)
    with pytest.raises(a3fta.AdapterFileError, match=match) as caught:
        load(model, folder, *args, **options)
    assert str(folder) in str(caught.value)
    assert "expected" in str(caught.value) and "found" in str(caught.value)
    assert snapshot(root) == before


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything a load could change: weights, modules, what trains, the switches, processors."""
    modules = {}
    for name, module in model.named_modules():
        own = {k: v for k, v in vars(module).items() if k in ("weights", "enabled", "backend")}
        processor = getattr(module, "processor", None)
        modules[name] = (type(module), id(processor), module.training, repr(own))
    tensors = {
        name: (
            id(parameter),
            parameter.dtype,
            parameter.requires_grad,
            None if parameter.device.type == "meta" else digest(parameter),
        )
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]
    }
    return {"modules": modules, "tensors": tensors, "notes": sorted(vars(model))}


def digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy()).hexdigest()


def header_of(folder: Path) -> dict[str, Any]:
    data = (folder / WEIGHTS_NAME).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def resigned(
    folder: Path,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    **edits: Any,
) -> None:
    """Edits the weights file and signs it anew; the twin goes, since it is not the subject.

    A dict is merged into the JSON of that metadata key, anything else replaces it.
    """
    metadata = header_of(folder)["__metadata__"]
    del metadata["sha256"]
    for key, edit in edits.items():
        if isinstance(edit, dict):
            metadata[key] = json.dumps({**json.loads(metadata[key]), **edit})
        else:
            metadata[key] = edit
    values = safetensors.load((folder / WEIGHTS_NAME).read_bytes())
    if tensors is not None:
        tensors(values)
    sha256 = adapter_file._digest(values, metadata)
    (folder / WEIGHTS_NAME).write_bytes(safetensors.save(values, {**metadata, "sha256": sha256}))
    twin_edited(folder, lambda twin: None)


def twin_edited(folder: Path, edit: Callable[[dict[str, Any]], Any], sign: bool = True) -> None:
    """Edits the config file, and signs it anew as the twin of these weights."""
    twin = json.loads((folder / CONFIG_NAME).read_text())
    metadata = header_of(folder)["__metadata__"]
    if sign:
        twin["config"] = json.loads(metadata["config"])
        twin["base"] = json.loads(metadata["base"])
        data = (folder / WEIGHTS_NAME).read_bytes()
        twin["weights"]["sha256"] = hashlib.sha256(data).hexdigest()
    signature = twin.pop("sha256")
    edit(twin)
    twin["sha256"] = adapter_file._twin_digest(twin) if sign else signature
    (folder / CONFIG_NAME).write_text(json.dumps(twin, indent=2))
