"""save_adapter and load_adapter: a model's adapter and its file.

`adapter_file` knows the bytes; here is what concerns the model: the names of the tensors, the
fingerprint of the base, and a load that checks everything before it touches anything.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import adapter_file
from .adapter_file import AdapterFile, AdapterFileError, refuse
from .adapters import AdapterConfig, BottleneckAdapter
from .backends import BACKENDS
from .checks import check_choice, describe
from .inject import check_name, inject, plan_injection, unfreeze
from .projection import AdaptedProjectionMixin, Columns
from .tree import adapted, check_known, check_unmerged, denoiser, projections
from .whereabouts import check_in_memory, fill, is_sharded, stock_type, whole, why_absent, writes

__all__ = ["AdapterFileError", "load_adapter", "save_adapter"]

logger = logging.getLogger("a3fta_kernels")

_SAMPLED_LAYERS = 16
_SAMPLES_PER_LAYER = 16
# rounding to bf16 moves a value by 2^-8 of itself at most, to fp16 by 2^-11 or, near zero, 2^-25;
# one copy of the weights may have been through either
_RELATIVE = 1.25 * 2.0**-8
_ABSOLUTE = 2.0**-24
_SAMPLED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def save_adapter(model: Any, folder: str | os.PathLike[str], name: str = "default") -> Path:
    """Writes one adapter to `folder`: adapter_model.safetensors and adapter_config.json.

    The weights file stands alone; it also holds the config and a fingerprint of the base (class,
    names and shapes of the adapted layers, some of their weights). Tensors are named
    `<layer>.<parameter>`, without the adapter's name and without PEFT's wrapping. The mixing
    weights of `set_adapters` belong to the model and are not stored.

    Both files are replaced atomically, weights first: an interrupted save leaves an adapter that
    loads. Other files in the folder stay.

    Of a model that FSDP2 shards every process has to call this: the shards are gathered, and the
    process of rank 0 writes.

    Returns the folder.

    Raises:
        TypeError, ValueError: no adapter of that name, merged layers, parameters that are not at
            hand (on the meta device, on disk, partitioned), or scales that differ between layers.
        OSError: from writing; the adapter that was there stays.
    """
    root = denoiser(model)
    layers = adapted(root)
    check_known("name", [name], layers.values())
    check_unmerged(layers, "save")
    check_in_memory(root, "save")
    layers = {key: layer for key, layer in layers.items() if name in layer.adapters}
    states = {key: _state(key, _adapter(layer, name)) for key, layer in layers.items()}
    tensors = {f"{k}.{p}": tensor for k, state in states.items() for p, tensor in state.items()}
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    tensors = {key: whole(tensor) for key, tensor in tensors.items()}
    samples = _samples(layers)
    config = _config([_adapter(layer, name) for layer in layers.values()])
    target = Path(folder)
    if not sharded or writes():
        adapter_file.write(
            target,
            tensors=tensors,
            config=config.to_dict(),
            base=_base(root, layers),
            samples=samples,
            library_version=sys.modules[__package__].__version__,
        )
    return target


def load_adapter(
    model: Any,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    allow_other_base: bool = False,
    backend: str | None = None,
) -> AdapterConfig:
    """Loads the adapter that `save_adapter` wrote to `folder`, under the name `name`.

    A model without an adapter of that name gets one, as by `inject` with the stored config; an
    adapter that is there takes the file's weights if it is of the same kind. The parameters keep
    the dtype and device that they have on the model. Everything is checked first: after an error
    the model is as it was. Nothing is unpickled. An adapter that FSDP2 shards is loaded by every
    process for itself.

    Args:
        model: a diffusers model, PEFT-wrapped or not, or a pipeline, whose denoiser is taken.
        folder: holds adapter_model.safetensors and adapter_config.json. Without the latter the
            weights file, which holds the settings too, is loaded with a warning; also where the
            latter is sound but describes other weights (an interrupted save).
        name: of the adapter on the model; the file does not hold one.
        allow_other_base: accept base weights other than those the adapter was trained on (a
            fine-tune of the same architecture). Names and shapes must fit all the same.
        backend: as in `inject`, for layers that are injected; None: what the model's adapted
            layers use already, else auto.

    Returns the stored config.

    Raises:
        AdapterFileError: a missing, truncated, damaged, edited or foreign file, a format version
            this library does not know, another base, or an adapter of another kind under `name`.
        TypeError, ValueError: bad arguments, merged layers, parameters that are not at hand (on
            the meta device, on disk, partitioned).
    """
    root = denoiser(model)
    check_name(name)
    if not isinstance(allow_other_base, bool):
        raise TypeError(
            f"allow_other_base: expected True or False, got {describe(allow_other_base)}"
        )
    if backend is not None:
        check_choice("backend", backend, ("auto", *BACKENDS))
    layers = projections(root)
    backend = backend or next((layer.backend for layer in layers.values()), "auto")
    check_unmerged(layers, "load")
    check_in_memory(root, "load")
    file = adapter_file.read(Path(folder))
    config = _parse_config(file)
    _check_base(file, root)
    existing = {key: layer for key, layer in layers.items() if name in layer.adapters}
    if existing:
        _check_layers(file, _shapes(existing), f"the adapter {name!r} of the model")
        adapters = {key: _adapter(layer, name) for key, layer in existing.items()}
        _check_kind(file, config, name, adapters)
        states = {key: _state(key, adapter) for key, adapter in adapters.items()}
        targets: Mapping[str, nn.Linear] = existing
    else:
        targets, states = _planned(file, root, config, name, backend)
    _check_samples(file, targets, allow_other_base)
    values = _converted(file, states)

    if not existing:
        inject(root, config, name, backend=backend)
        added = projections(root)
        states = {key: _state(key, _adapter(added[key], name)) for key in targets}
    with torch.no_grad():
        for key, state in states.items():
            for parameter, tensor in state.items():
                fill(tensor, values[f"{key}.{parameter}"])
    unfreeze(root)
    return config


def _adapter(layer: AdaptedProjectionMixin, name: str) -> BottleneckAdapter:
    return layer.adapters[name]  # type: ignore[return-value]


def _state(layer: str, adapter: BottleneckAdapter) -> dict[str, Tensor]:
    """The adapter's tensors, sharing its memory."""
    state = adapter.state_dict(keep_vars=True)
    for parameter, tensor in state.items():
        reason = why_absent(tensor)
        if reason is not None:
            raise ValueError(
                f"model: expected adapter parameters at hand, got {layer}'s {parameter} {reason}"
            )
    return {parameter: tensor.detach() for parameter, tensor in state.items()}


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
    if file.base["model"] != model:
        refuse(
            file.path,
            f"an adapter for a {model}",
            f"one for a {file.base['model']}",
        )


def _check_layers(file: AdapterFile, here: Mapping[str, str], whose: str) -> None:
    stored = file.base["layers"]
    for key in sorted({*stored, *here}):
        if stored.get(key) != here.get(key):
            refuse(
                file.path,
                f"{key} {_presence(here.get(key))} ({whose})",
                f"{key} {_presence(stored.get(key))} (the adapter's base)",
            )


def _presence(shape: Any) -> str:
    return "not adapted" if shape is None else f"of shape {shape}"


def _samples(layers: Mapping[str, nn.Module]) -> dict[str, list[float | None]]:
    """Some weights of some layers: enough to tell one base from another at little cost."""
    keys = sorted(key for key, layer in layers.items() if _readable(layer))
    step = max(1, math.ceil(len(keys) / _SAMPLED_LAYERS))
    return {key: _sampled(layers[key]) for key in keys[::step]}


def _readable(layer: nn.Module) -> bool:
    """Whether the weight is at hand, in a plain floating dtype."""
    weight: Any = layer.weight
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in _SAMPLED_DTYPES
    return plain and why_absent(weight) is None


def _sampled(layer: nn.Module) -> list[float | None]:
    """Weights at even distances."""
    weight: Any = layer.weight
    count = min(_SAMPLES_PER_LAYER, weight.numel())
    places = torch.arange(count, device=weight.device) * (weight.numel() - 1) // max(1, count - 1)
    values = weight.detach().reshape(-1)[places].double().tolist()
    return [value if math.isfinite(value) else None for value in values]


def _check_samples(
    file: AdapterFile, layers: Mapping[str, nn.Linear], allow_other_base: bool
) -> None:
    compared = 0
    for key, stored in file.samples.items():
        if key not in layers or not isinstance(stored, list):
            refuse(file.path, "samples of adapted layers", f"samples of {key}: {stored!r:.80}")
        if not _readable(layers[key]):
            continue
        compared += 1
        here = _sampled(layers[key])
        if len(stored) != len(here):
            refuse(file.path, f"{len(here)} samples of {key}", f"{len(stored)}")
        for a, b in zip(stored, here, strict=True):
            if allow_other_base or _close(a, b):
                continue
            refuse(
                file.path,
                f"an adapter for this base, with {b} in {key}.weight",
                f"one for another, with {a} there; allow_other_base=True accepts it",
            )
    if not compared:
        logger.info(
            "%s: the base's weights were not compared, they are not at hand in a plain dtype "
            "(offloaded, quantized or cast for storage); names and shapes fit",
            file.path,
        )


def _close(a: Any, b: float | None) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, bool) or not isinstance(a, (int, float)):
        return False
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)


def _converted(file: AdapterFile, states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The file's tensors in the parameters' dtypes; names, shapes and range are checked."""
    wanted = {f"{key}.{p}": tensor for key, state in states.items() for p, tensor in state.items()}
    for key in sorted({*wanted, *file.tensors}):
        if key not in wanted or key not in file.tensors:
            found = "it" if key in file.tensors else "none"
            refuse(file.path, f"{'a' if key in wanted else 'no'} tensor {key}", found)
        if file.tensors[key].shape != wanted[key].shape:
            refuse(
                file.path,
                f"{key} of shape {tuple(wanted[key].shape)}",
                f"shape {tuple(file.tensors[key].shape)}",
            )
    values = {}
    for key, tensor in file.tensors.items():
        dtype = wanted[key].dtype
        values[key] = tensor.to(dtype)
        if not torch.equal(values[key].isfinite(), tensor.isfinite()):
            refuse(file.path, f"{key} in the range of {dtype}", f"{tensor.dtype} beyond it")
    return values
