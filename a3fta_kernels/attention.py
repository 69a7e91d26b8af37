"""The attention of a whole model: its engine, and q, k and v in one product."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from . import processors
from .backends import BackendUnavailableError, backends
from .checks import check_choice
from .processors import qkv
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
        before = processors.processor_of(layer)
        # a processor may be the user's own, and serve layers without an adapter
        fresh = copy.copy(ours)
        fresh.attention = engine
        _remember(root, layer, name, before)
        layer.set_processor(fresh)  # type: ignore[operator]
    return engines_in_use(root)


def fuse_qkv(model: Any) -> dict[str, str]:
    """Lets one matrix product compute q, k and v in self-attention, k and v in cross-attention.

    The weights of each layer move side by side into one piece of memory: parameters, names,
    values and what saves them stay, and unlike diffusers' `fuse_qkv_projections` there is no
    second copy. The sums are those of three products, but a library may round them otherwise:
    that is why `inject` does not do it by itself.

    Layers are joined as long as they are frozen, plain `nn.Linear` layers without hooks whose
    weights lie so; that is seen in every forward. Else, under autocast to another dtype and
    under torch.compile, each layer computes its own product. A move (`.to`), a deep copy and new
    parameters part them: call this again afterwards. `unfuse_qkv` and `eject` undo it.

    Returns:
        For every adapted attention layer "", or the reason why it stays as it is.
    """
    adapted(model)
    found = {}
    for name, layer, groups in _groups(denoiser(model)):
        processor = processors.processor_of(layer)
        if not getattr(processor, "joins", False):
            kind = type(layer if processor is None else processor).__name__
            found[name] = f"its processor is of class {kind}"
            continue
        reasons = [_why_apart(group) for group in groups]
        for group, reason in zip(groups, reasons, strict=True):
            if not reason:
                qkv.lay_side_by_side(group)
        found[name] = next((reason for reason in reasons if reason), "")
    return found


def unfuse_qkv(model: Any) -> None:
    """Undoes `fuse_qkv`: every weight in memory of its own."""
    qkv.lay_apart(denoiser(model))


def _groups(root: nn.Module) -> Iterator[tuple[str, nn.Module, list[tuple[nn.Module, ...]]]]:
    """Adapted attention layers, with their projections of one input in groups."""
    family = processors.family_of(root)
    for name, layer, _ in _layers(root):
        yield name, layer, family.joinable(layer)


def _why_apart(group: tuple[nn.Module, ...]) -> str:
    """Why these layers cannot share memory; "" where they can."""
    reason = qkv.why_not_plain(group)
    if reason is not None:
        return reason
    weights: list[Any] = [layer.weight for layer in group]
    first = weights[0]
    if first.device.type == "meta":
        return "a weight is on the meta device"
    if len({id(weight) for weight in weights}) < len(weights):
        return "two layers have one weight"
    if any(w.is_inference() for w in weights):
        return "a weight was made in inference mode"
    kinds = {(w.device, w.dtype, w.shape[1]) for w in weights}
    return "" if len(kinds) == 1 else f"their weights differ: {sorted(map(str, kinds))}"


def engines_in_use(root: nn.Module) -> dict[str, str]:
    """The engine of every adapted attention layer; the class of a processor that is not ours."""
    found = {}
    for name, layer, ours in _layers(root):
        current = processors.processor_of(layer)
        if current is not None and ours is current:
            found[name] = ours.attention
        else:
            found[name] = type(layer if current is None else current).__name__
    return found


def _layers(root: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Adapted attention layers, with our processor or the one that would replace the present."""
    family = processors.family_of(root)
    for site in family.sites(root):
        layers = (*site.projections.values(), *map(root.get_submodule, site.unsure))
        parts = (part for layer in layers for part in layer.modules())
        if any(isinstance(part, AdaptedProjectionMixin) for part in parts):
            current = processors.processor_of(site.attention)
            ours = current if family.owns(current) else family.processor_for(current)
            yield site.name, site.attention, ours


def _remember(root: nn.Module, layer: nn.Module, name: str, processor: Any) -> None:
    """For `eject`, unless it knows what the layer had before."""
    for holder, record in records(root):
        if any(holder.get_submodule(n) is layer for n in record["processors"]):
            return
    record = root.__dict__.setdefault(RECORD, {"trained": [], "processors": {}})
    record["processors"][name] = processor
