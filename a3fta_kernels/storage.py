"""save_adapter and load_adapter: a model's adapter and its file.

`adapter_file` knows the bytes; here is what concerns the model: the names of the tensors, the
fingerprint of the base, and a load that checks everything before it touches anything.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapter_file, hub, peft_file
from .adapter_file import AdapterFile, AdapterFileError, refuse
from .adapters import DESIGNS, AdapterConfig, BottleneckAdapter
from .attention_weights import check_apart, trained_values
from .backends import BACKENDS
from .checks import check_choice, describe
from .fingerprint import about, check_samples, samples
from .inject import inject, unfreeze
from .planning import check_name, plan_injection
from .projection import AdaptedProjectionMixin, Columns
from .tree import (
    adapted,
    check_known,
    check_one_batch,
    check_unmerged,
    denoiser,
    holding,
    projections,
)
from .whereabouts import check_in_memory, fill, is_sharded, stock_type, whole, why_absent, writes

__all__ = ["AdapterFileError", "load_adapter", "save_adapter"]

LAYOUTS = ("a3fta", "peft")


def save_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    layout: str = "a3fta",
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Writes one adapter to `folder`: adapter_model.safetensors and adapter_config.json.

    The weights file stands alone; it also holds the config and a fingerprint of the base (class,
    names and shapes of the adapted layers, some of their weights). Tensors are named
    `<layer>.<parameter>`, without the adapter's name and without PEFT's wrapping; attention that
    trained beside the adapter is stored whole, as `attention:<layer>.<parameter>`. The mixing
    weights of `set_adapters` belong to the model and are not stored. What the adapter comes from
    is told beside: the model's family and its name on the Hub, the versions of the libraries.

    Args:
        model: a diffusers model or a pipeline, adapted by `inject`, or by PEFT with an A3FTAConfig.
        folder: is made where it is missing.
        name: of the adapter on the model.
        layout: "a3fta", or "peft": the folder that `PeftModel.from_pretrained` reads, which has no
            fingerprint and tells nothing. `load_adapter` reads both.
        training: settings of the training to tell, of JSON's types; None with layout="peft".

    Both files are replaced atomically, weights first: an interrupted save leaves an adapter that
    loads. Other files in the folder stay.

    Of a model that FSDP2 shards every process has to call this: the shards are gathered, and the
    process of rank 0 writes.

    Returns the folder.

    Raises:
        TypeError, ValueError: no adapter of that name, merged layers, parameters that are not at
            hand (on the meta device, on disk, partitioned), scales that differ between layers,
            training that is not JSON.
        OSError: from writing; the adapter that was there stays.
    """
    root = denoiser(model)
    check_choice("layout", layout, LAYOUTS)
    if layout == "peft" and training is not None:
        raise ValueError(
            f"training: expected None beside layout='peft', which tells nothing, got "
            f"{describe(training)}"
        )
    layers = holding(root, name)
    if not layers:
        check_known("name", [name], adapted(root).values())
    check_unmerged(layers, "save")
    check_in_memory(root, "save")
    check_apart(root, "save them")
    told = about(root, training)
    states = {key: _state(key, _adapter(layer, name)) for key, layer in layers.items()}
    states |= _attention(trained_values(root, name))
    tensors = {f"{k}.{p}": tensor for k, state in states.items() for p, tensor in state.items()}
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    tensors = {key: whole(tensor) for key, tensor in tensors.items()}
    config = _config([_adapter(layer, name) for layer in layers.values()])
    if layout == "peft" and config.train != "adapter":
        raise ValueError(
            f"layout: expected 'a3fta' for an adapter with train={config.train!r}, which PEFT does "
            f"not have, got 'peft'"
        )
    target = Path(folder)
    if sharded and not writes():
        return target
    if layout == "peft":
        peft_file.write(target, tensors, config)
        return target
    adapter_file.write(
        target,
        tensors=tensors,
        config=config.to_dict(),
        base=_base(root, layers),
        samples=samples(root, layers),
        library_version=sys.modules[__package__].__version__,
        about=told,
    )
    return target


def load_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    allow_other_base: bool = False,
    pad_rank: bool = False,
    backend: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
) -> AdapterConfig:
    """Loads the adapter that `save_adapter` wrote to `folder`, under the name `name`.

    A model without an adapter of that name gets one, as by `inject` with the stored config; an
    adapter that is there takes the file's weights if it is of the same kind: a hot swap, for which
    compiled code stays as it is. The parameters keep the dtype and device that they have on the
    model. Everything is checked first: after an error the model is as it was. Nothing is
    unpickled. An adapter that FSDP2 shards is loaded by every process for itself.

    Args:
        model: a diffusers model, PEFT-wrapped or not, or a pipeline, whose denoiser is taken.
        folder: holds adapter_model.safetensors and adapter_config.json. Without the latter the
            weights file, which holds the settings too, is loaded with a warning; also where the
            latter is sound but describes other weights (an interrupted save). Or one that PEFT
            saved of an A3FTAConfig: names and shapes are checked then, as it has no fingerprint.
            Or the name of a repository on the Hub, where there is no folder of that name.
        name: of the adapter on the model; the file does not hold one.
        allow_other_base: accept base weights other than those the adapter was trained on (a
            fine-tune of the same architecture). Names and shapes must fit all the same.
        pad_rank: an adapter that is there takes one of smaller rank too, padded with zeros, which
            change nothing. Inject one of the largest rank first, compile, and swap them all in.
            Not with time_rank, where the rank itself decides what acts at a timestep.
        backend: as in `inject`, for layers that are injected; None: what the model's adapted
            layers use already, else auto.
        revision, token: of the repository on the Hub.
        subfolder: of the folder or the repository.

    Returns the stored config.

    Raises:
        AdapterFileError: a missing, truncated, damaged, edited or foreign file, a format version
            this library does not know, another base, or an adapter of another kind under `name`.
        TypeError, ValueError: bad arguments, merged layers, parameters that are not at hand (on
            the meta device, on disk, partitioned).
    """
    root = denoiser(model)
    check_name(name)
    for argument, value in (("allow_other_base", allow_other_base), ("pad_rank", pad_rank)):
        if not isinstance(value, bool):
            raise TypeError(f"{argument}: expected True or False, got {describe(value)}")
    if backend is not None:
        check_choice("backend", backend, ("auto", *BACKENDS))
    layers = projections(root)
    backend = backend or next((layer.backend for layer in layers.values()), "auto")
    check_unmerged(layers, "load")
    check_in_memory(root, "load")
    check_apart(root, "load them")
    check_one_batch(layers, "load an adapter")
    file = _read(folder, revision, subfolder, token)
    config = _parse_config(file)
    _check_base(file, root)
    existing = {key: layer for key, layer in layers.items() if name in layer.adapters}
    if existing:
        _check_layers(file, _shapes(existing), f"the adapter {name!r} of the model")
        adapters = {key: _adapter(layer, name) for key, layer in existing.items()}
        _check_kind(file, config, name, adapters)
        states = {key: _state(key, adapter) for key, adapter in adapters.items()}
        states |= _attention(trained_values(root, name))
        targets: Mapping[str, nn.Linear] = existing
    else:
        targets, states = _planned(file, root, config, name, backend)
    check_samples(file, root, targets, allow_other_base)
    axes = DESIGNS[config.design].rank_axes if pad_rank and existing else {}
    values = _converted(file, states, axes, config.time_rank)

    if not existing:
        inject(root, config, name, backend=backend)
        added = projections(root)
        states = {key: _state(key, _adapter(added[key], name)) for key in targets}
        states |= _attention(trained_values(root, name))
    with torch.no_grad():
        for key, state in states.items():
            for parameter, tensor in state.items():
                fill(tensor, values[f"{key}.{parameter}"])
    unfreeze(root)
    return config


def _read(
    folder: str | os.PathLike[str],
    revision: str | None,
    subfolder: str | None,
    token: str | bool | None,
) -> AdapterFile:
    if hub.is_repository(folder):
        path = hub.download(os.fspath(folder), revision, subfolder, token)
    else:
        path = Path(folder) / (subfolder or "")
    return peft_file.read(path) if peft_file.is_peft(path) else adapter_file.read(path)


def _adapter(layer: AdaptedProjectionMixin, name: str) -> BottleneckAdapter:
    return layer.adapters[name]  # type: ignore[return-value]


def _state(layer: str, adapter: BottleneckAdapter) -> dict[str, Tensor]:
    """The adapter's tensors, sharing its memory."""
    return _at_hand(layer, adapter.state_dict(keep_vars=True))


def _at_hand(layer: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for parameter, tensor in state.items():
        reason = why_absent(tensor)
        if reason is not None:
            raise ValueError(
                f"model: expected adapter parameters at hand, got {layer}'s {parameter} {reason}"
            )
    return {parameter: tensor.detach() for parameter, tensor in state.items()}


def _attention(values: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Attention's own tensors among those of the adapters: `attention:<layer>`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in values.items():
        layer, _, leaf = name.rpartition(".")
        found.setdefault(f"attention:{layer}", {})[leaf] = tensor
    return {key: _at_hand(key, state) for key, state in found.items()}


def _config(adapters: list[BottleneckAdapter]) -> AdapterConfig:
    """What would inject these adapters again, their scale as it is now."""
    config = adapters[0].config
    scales = sorted({float(adapter.scale) for adapter in adapters})
    if len(scales) > 1:
        raise ValueError(f"model: expected one scale for all layers, got {scales}")
    return dataclasses.replace(config, scale=scales[0])


def _parse_config(file: AdapterFile) -> AdapterConfig:
    try:
        return AdapterConfig.from_dict(file.config)
    except (TypeError, ValueError) as error:
        refuse(file.path, "a valid config", f"one that is not: {error}", error)


def _planned(
    file: AdapterFile, root: nn.Module, config: AdapterConfig, name: str, backend: str
) -> tuple[dict[str, nn.Linear], dict[str, dict[str, Tensor]]]:
    """The layers that `inject` will adapt, and its tensors' shapes and dtypes, without doing it."""
    try:
        plan = plan_injection(root, config, name, backend)
    except ValueError as error:
        refuse(file.path, "a config that fits this model", f"one that does not: {error}", error)
    shapes = {key: _shape(linear, plan.columns[key]) for key, linear in plan.targets.items()}
    _check_layers(file, shapes, "its config on this model")
    # before anything of that size is made
    largest = max((size for t in file.tensors.values() for size in t.shape), default=0)
    if max(plan.ranks.values()) > largest:
        refuse(file.path, f"tensors of rank {max(plan.ranks.values())}", f"at most {largest}")
    with torch.device("meta"):
        states = {key: dict(plan.adapter(key, "meta").state_dict()) for key in plan.targets}
    states |= _attention(plan.attention)
    return plan.targets, states


def _check_kind(
    file: AdapterFile, config: AdapterConfig, name: str, adapters: dict[str, BottleneckAdapter]
) -> None:
    for layer, adapter in adapters.items():
        there = {
            "design": adapter.config.design,
            "activation": adapter.activation,
            "scale": float(adapter.scale),
            "bias": adapter.b_down is not None,
            **{f: getattr(adapter.config, f) for f in ("train", "layer_norm", "placement")},
            "time_window": adapter.config.time_window,
            "time_rank": adapter.config.time_rank,
        }
        for field, value in there.items():
            if value != getattr(config, field):
                refuse(
                    file.path,
                    f"{field}={value!r}, as the adapter {name!r} on {layer} has",
                    f"{field}={getattr(config, field)!r}; eject it first, or load under another "
                    f"name",
                )


def _base(root: nn.Module, layers: Mapping[str, AdaptedProjectionMixin]) -> dict[str, Any]:
    return {"model": stock_type(root).__name__, "layers": _shapes(layers)}


def _shapes(layers: Mapping[str, AdaptedProjectionMixin]) -> dict[str, str]:
    return {key: _shape(layer, layer.columns) for key, layer in layers.items()}


def _shape(linear: nn.Linear, columns: Columns) -> str:
    """`3072x3072`; `3072x15360[0:3072]` where adapters act on a slice of the input's columns."""
    shape = f"{linear.out_features}x{linear.in_features}"
    if columns is None:
        return shape
    start, length = columns
    return f"{shape}[{start}:{start + length}]"


def _check_base(file: AdapterFile, root: nn.Module) -> None:
    if set(file.base) != {"model", "layers"} or not isinstance(file.base["layers"], dict):
        refuse(file.path, "a base with model and layers", repr(file.base)[:80])
    model = stock_type(root).__name__
    if file.base["model"] not in (None, model):
        refuse(
            file.path,
            f"an adapter for a {model}",
            f"one for a {file.base['model']}",
        )


def _check_layers(file: AdapterFile, here: Mapping[str, str], whose: str) -> None:
    stored = file.base["layers"]
    for key in sorted({*stored, *here}):
        known = stored.get(key) is not None or key not in stored
        if key not in here or (known and stored.get(key) != here[key]):
            refuse(
                file.path,
                f"{key} {_presence(here, key)} ({whose})",
                f"{key} {_presence(stored, key)} (the adapter's base)",
            )


def _presence(shapes: Mapping[str, Any], key: str) -> str:
    if key not in shapes:
        return "not adapted"
    return "adapted" if shapes[key] is None else f"of shape {shapes[key]}"


def _converted(
    file: AdapterFile, states: dict[str, dict[str, Tensor]], axes: Mapping[str, tuple[int, int]],
    time_rank: int | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The file's tensors in the parameters' dtypes; names, shapes and range are checked.

    axes: `rank_axes` of those that may be of smaller rank.
    """
    wanted = {f"{key}.{p}": tensor for key, state in states.items() for p, tensor in state.items()}
    tensors = {}
    for key in sorted({*wanted, *file.tensors}):
        if key not in wanted or key not in file.tensors:
            found = "it" if key in file.tensors else "none"
            refuse(file.path, f"{'a' if key in wanted else 'no'} tensor {key}", found)
        tensors[key] = file.tensors[key]
        leaf = key.rpartition(".")[2]
        if leaf in axes:
            tensors[key] = _padded(tensors[key], wanted[key], *axes[leaf])
        stays = time_rank is not None and tensors[key] is not file.tensors[key]
        if stays or tensors[key].shape != wanted[key].shape:
            why = f", as with {time_rank=} the rank decides what acts at a timestep"
            refuse(
                file.path,
                f"{key} of shape {tuple(wanted[key].shape)}{why if stays else ''}",
                f"shape {tuple(file.tensors[key].shape)}",
            )
    values = {}
    for key, tensor in tensors.items():
        dtype = wanted[key].dtype
        values[key] = tensor.to(dtype)
        if not torch.equal(values[key].isfinite(), tensor.isfinite()):
            refuse(file.path, f"{key} in the range of {dtype}", f"{tensor.dtype} beyond it")
    return values


def _padded(tensor: Tensor, wanted: Tensor, axis: int, count: int) -> Tensor:
    """With zeros up to the wanted rank, where its own is smaller, in each of `count` parts."""
    if tensor.dim() != wanted.dim():
        return tensor
    missing = (wanted.shape[axis] - tensor.shape[axis]) // count
    if missing <= 0 or tensor.shape[axis] % count:
        return tensor
    zeros = tensor.new_zeros([*tensor.shape[:axis], missing, *tensor.shape[axis + 1 :]])
    parts = [x for part in tensor.chunk(count, axis) for x in (part, zeros)]
    return torch.cat(parts, dim=axis)
