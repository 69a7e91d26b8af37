"""The attention engine of a whole model: `set_attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from . import processors
from .backends import BackendUnavailableError, backends
from .checks import check_choice
from .processors.engines import ENGINES, check_installed
from .projection import AdaptedProjectionMixin
from .tree import RECORD, adapted, denoiser, records

# "sliced" comes with a number: diffusers' set_attention_slice
_CHOICES = tuple(name for name in ENGINES if name != "sliced")


def set_attention(model: Any, engine: str) -> dict[str, str]:
    """Chooses how the adapted attention layers compute softmax(Q K^T) V.

    Args:
        model: a model with adapters, or a pipeline.
        engine: auto, sdpa, flash, cudnn, efficient, flash3, xformers or math, as in
            `processors.A3FTAAttnProcessor`. `backends()` says which run here.

    Stock processors that have taken the place of ours (`enable_xformers_...`,
    `set_attention_slice`) are replaced again; one that is not known stays. `eject` brings back
    the processors from before the injection.

    Returns:
        The engine of every adapted attention layer by name; the class of a processor that stays.

    Raises:
        ValueError: an unknown engine, or a model without adapters.
        BackendUnavailableError: the engine cannot run here. Nothing is changed then.
    """
    check_choice("engine", engine, _CHOICES)
    device = next(iter(adapted(model).values())).weight.device.type
    check_installed(engine)
    status = backends().get(engine)
    if status is not None and device != "meta" and device not in status.devices:
        raise BackendUnavailableError(f"attention {engine!r} on {device}: {status.reason}")
    root = denoiser(model)
    for name, layer, ours in _layers(root):
        if ours is None:
            continue
        ours.attention = engine
        before = layer.get_processor()  # type: ignore[operator]
        if ours is not before:
            _remember(root, layer, name, before)
            layer.set_processor(ours)  # type: ignore[operator]
    return engines_in_use(root)


def engines_in_use(root: nn.Module) -> dict[str, str]:
    """The engine of every adapted attention layer; the class of a processor that is not ours."""
    found = {}
    for name, layer, ours in _layers(root):
        current = layer.get_processor()  # type: ignore[operator]
        found[name] = ours.attention if ours is current else type(current).__name__
    return found


def _layers(root: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Adapted attention layers, with our processor or the one that would replace the present."""
    family = processors.family_of(root)
    for name, layer, projections in family.sites(root) if family is not None else ():
        parts = (part for projection in projections.values() for part in projection.modules())
        if family is not None and any(isinstance(part, AdaptedProjectionMixin) for part in parts):
            current = layer.get_processor()  # type: ignore[operator]
            ours = current if family.owns(current) else family.processor_for(current)
            yield name, layer, ours


def _remember(root: nn.Module, layer: nn.Module, name: str, processor: Any) -> None:
    """For `eject`, unless it knows what the layer had before."""
    for holder, record in records(root):
        if any(holder.get_submodule(n) is layer for n in record["processors"]):
            return
    record = root.__dict__.setdefault(RECORD, {"trained": [], "processors": {}})
    record["processors"][name] = processor
