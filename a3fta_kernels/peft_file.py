"""PEFT's folder of an A3FTA adapter, read as data and written; PEFT itself is not needed.

The names are those of `adapter_file`, adapter_model.safetensors and adapter_config.json, so the
latter tells the two apart: PEFT's has a `peft_type`. Tensors are named
`base_model.model.<layer>.a3fta_adapters.<parameter>`. There is no fingerprint of the base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from torch import Tensor

from .adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFile,
    parse_json,
    refuse,
    replace,
    serialize,
)
from .adapters import AdapterConfig

NAME = "A3FTA"  # in PEFT's table of types
ADAPTERS = "a3fta_adapters"  # what PEFT's layer calls its adapters
# settings that are called and written alike in `AdapterConfig` and in PEFT's config
SAME = (
    "rank", "activation", "scale", "design", "dropout", "layer_norm", "drop_path", "time_window",
    "time_rank", "placement",
)  # fmt: skip

_PREFIX = "base_model.model."
_STORED = {*SAME, "dtype"}
# what PEFT notes in every config; `rank_pattern` is seen in the tensors
_OTHERS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version",
    "rank_pattern", "revision", "target_modules", "task_type", "use_bias",
}  # fmt: skip


def is_peft(folder: Path) -> bool:
    """Whether PEFT, or `write`, made this folder."""
    try:
        values = json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False  # adapter_file.read says what is wrong
    return isinstance(values, dict) and "peft_type" in values


def read(folder: Path) -> AdapterFile:
    """The adapter in PEFT's folder, its config that of `inject`, for exactly the layers it has.

    Raises AdapterFileError for a folder of another method and for damaged files.
    """
    path = folder / WEIGHTS_NAME
    try:
        values = parse_json(folder / CONFIG_NAME, (folder / CONFIG_NAME).read_bytes())
        blob = path.read_bytes()
    except OSError as error:
        refuse(path, "a readable file", error.strerror or type(error).__name__, error)
    if values.get("peft_type") != NAME:
        refuse(folder / CONFIG_NAME, f"peft_type {NAME!r}", repr(values.get("peft_type"))[:80])
    try:
        found = parse_tensors(blob)
    except (SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
        refuse(path, "whole tensors", f"a damaged file ({error})", error)
    tensors, ranks = {}, {}
    for key, tensor in found.items():
        layer, _, parameter = key.removeprefix(_PREFIX).rpartition(f".{ADAPTERS}.")
        if not layer or not tensor.is_floating_point():
            refuse(path, f"tensors of a {NAME} adapter alone", f"{key}, {tensor.dtype}")
        tensors[f"{layer}.{parameter}"] = tensor
        if parameter == "w_down" and tensor.ndim == 2:
            ranks[layer] = len(tensor)
    if not ranks:
        refuse(path, f"tensors of a {NAME} adapter", "none")
    return AdapterFile(
        path=path,
        tensors=tensors,
        config=_config(folder / CONFIG_NAME, values, ranks),
        base={"model": None, "layers": dict.fromkeys(ranks)},
        samples={},
        library_version="",
    )


def _config(path: Path, values: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
    unknown = {
        k for k, v in values.items() if k not in _STORED | _OTHERS and v not in (None, {}, [])
    }
    if unknown:
        refuse(path, f"settings of a {NAME} adapter", ", ".join(sorted(unknown)))
    config = {name: values[name] for name in _STORED if name in values}
    if "use_bias" in values:
        config["bias"] = values["use_bias"]
    rank = config.get("rank", AdapterConfig.rank)
    other = {layer: found for layer, found in ranks.items() if found != rank}
    config["rank_pattern"] = {f"^{re.escape(layer)}$": found for layer, found in other.items()}
    config["targets"] = sorted(ranks)
    return config


def write(folder: Path, tensors: Mapping[str, Tensor], config: AdapterConfig) -> None:
    """The adapter as PEFT would save it. Both files are replaced as `adapter_file.write` does."""
    tensors = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    parts = {key: key.rpartition(".")[::2] for key in tensors}
    ranks = {parts[key][0]: len(t) for key, t in tensors.items() if parts[key][1] == "w_down"}
    values = {
        **{name: value for name, value in config.to_dict().items() if name in _STORED},
        "peft_type": NAME,
        "use_bias": config.bias,
        "target_modules": list(ranks),
        "rank_pattern": {re.escape(k): rank for k, rank in ranks.items() if rank != config.rank},
    }
    names = {key: f"{_PREFIX}{layer}.{ADAPTERS}.{own}" for key, (layer, own) in parts.items()}
    weights = serialize({names[key]: t for key, t in tensors.items()}, {"format": "pt"})
    text = json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"
    folder.mkdir(parents=True, exist_ok=True)
    replace({folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: text})
