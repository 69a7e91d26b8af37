"""Attention that trains beside its adapter: q, k, v and out of the layers that have one.

The second mode of the method (`train="adapter+attention"`). Those weights belong to one adapter:
wherever it acts the model has the trained ones, elsewhere (`disabled`, `set_adapters` without it)
the stock ones, and after `eject` the stock ones for good. For that their stock values are kept,
on the CPU, in the record of the injection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .forwards import inside
from .tree import RECORD, plain_name, projections, records
from .whereabouts import check_in_memory, unreadable_weight

_KEY = "attention"  # in a record: adapter name -> Trained


@dataclass
class Trained:
    """The attention that one adapter trains; the keys are plain names of parameters."""

    stock: dict[str, Tensor]  # on the CPU
    trains: bool = True
    away: dict[str, Tensor] = field(default_factory=dict)  # trained, while the model has stock's


def find(name: str, attention: nn.Module, outputs: dict[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Weights and biases of the layer's linear maps: those inside it, and those it hands over to.

    What PEFT or a processor added is not the layer's own. ValueError where one cannot train.
    """
    if _is_fused(attention):
        raise ValueError(
            f"train: expected q, k and v apart to train attention, got {name} with diffusers' "
            f"fused copy of them; call unfuse_qkv_projections first"
        )
    found: dict[str, nn.Parameter] = {}
    inside = {f"{name}.{key}" if name else key: layer for key, layer in _linears(attention)}
    for key, linear in (inside | outputs).items():
        reason = _why_not(linear)
        if reason is not None:
            raise ValueError(
                f"model: expected plain weights to train attention, got {key}: {reason}"
            )
        for leaf, parameter in linear.named_parameters(recurse=False):
            found[f"{plain_name(key)}.{leaf}"] = parameter
    return found


def _is_fused(module: nn.Module) -> bool:
    """Whether diffusers' fused copy of q, k and v computes in their place."""
    if not getattr(module, "fused_projections", False):
        return False
    # `Attention` keeps the mark after unfuse_qkv_projections; there the processor tells
    processor = type(getattr(module, "processor", None)).__name__
    return hasattr(module, "unfuse_projections") or "Fused" in processor


def _linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        base = inside(child)
        if isinstance(base, nn.Linear):
            yield f"{prefix}{name}", base
        elif name != "processor":
            yield from _linears(base, f"{prefix}{name}.")


def _why_not(linear: nn.Module) -> str | None:
    for parameter in linear.parameters(recurse=False):
        if (reason := unreadable_weight(parameter)) is not None:
            return reason
        if parameter.is_inference():
            return "it was made in inference mode"
    return None


def check_free(root: nn.Module, wanted: Iterable[str]) -> None:
    """ValueError where one of these parameters trains with another adapter already."""
    wanted = set(wanted)
    for holder, name, own in owned(root):
        prefix = _prefix(root, holder)
        taken = next((key for key in own.stock if prefix + key in wanted), None)
        if taken is not None:
            raise ValueError(
                f"train: expected attention that no other adapter trains, got {prefix}{taken}, "
                f"which trains with adapter {name!r}; eject that one, or train adapters alone"
            )


def check_untied(root: nn.Module, wanted: dict[str, nn.Parameter]) -> None:
    """ValueError where one of these parameters has a second name: it would train there too."""
    names = {id(parameter): name for name, parameter in wanted.items()}
    for key, parameter in root.named_parameters(remove_duplicate=False):
        name, other = names.get(id(parameter)), plain_name(key)
        if name is not None and name != other:
            raise ValueError(
                f"model: expected attention weights that no other layer shares to train them, got "
                f"{name}, which is {other} too; give one of them a copy, or train adapters alone"
            )


def check_apart(root: nn.Module, action: str) -> None:
    """ValueError where diffusers' fused copy computes in the place of attention that trains."""
    for holder, name, own in owned(root):
        for path, module in holder.named_modules():
            inside = f"{plain_name(path)}."
            if _is_fused(module) and any(key.startswith(inside) for key in own.stock):
                raise ValueError(
                    f"model: expected q, k and v apart to {action}, got {_prefix(root, holder)}"
                    f"{inside[:-1]}, which trains with adapter {name!r}, with diffusers' fused "
                    f"copy of them; call unfuse_qkv_projections first"
                )


def check_switchable(root: nn.Module, action: str, name: str | None = None) -> bool:
    """Whether attention trains, with that adapter or any; ValueError where it does and cannot be
    exchanged."""
    found = [(holder, own) for holder, owner, own in owned(root) if name in (None, owner)]
    if not found:
        return False
    check_in_memory(root, action)
    check_apart(root, action)
    for holder, own in found:
        for key, parameter in parameters(holder, own).items():
            memory = parameter.data
            if (
                type(memory) is not Tensor
                or memory.device.type == "meta"
                or memory.shape != own.stock[key].shape
            ):
                raise ValueError(
                    f"model: expected whole weights at hand to {action}, got "
                    f"{_prefix(root, holder)}{key} as a {type(memory).__name__} of shape "
                    f"{tuple(memory.shape)} on {memory.device} (sharded or offloaded?)"
                )
    return True


def begin(record: dict[str, Any], name: str, parameters: dict[str, nn.Parameter]) -> None:
    """Keeps the stock values, and lets the parameters train."""
    stock = {k: p.detach().to("cpu", copy=True) for k, p in parameters.items()}
    record.setdefault(_KEY, {})[name] = Trained(stock)
    for parameter in parameters.values():
        parameter.requires_grad_(True)


def owned(root: nn.Module) -> Iterator[tuple[nn.Module, str, Trained]]:
    """(module that was injected, adapter name, the attention it trains)."""
    for holder, record in records(root):
        for name, own in record.get(_KEY, {}).items():
            yield holder, name, own


def parameters(holder: nn.Module, own: Trained) -> dict[str, nn.Parameter]:
    """Those of the record, by its names; ValueError where the model has one no more."""
    found = {plain_name(name): p for name, p in holder.named_parameters()}
    gone = next((key for key in own.stock if key not in found), None)
    if gone is not None:
        raise ValueError(
            f"model: expected the parameters of attention that train, got no {gone} any more "
            f"(parametrized, tied, or removed since inject?)"
        )
    return {key: found[key] for key in own.stock}


def trained_values(root: nn.Module, name: str) -> dict[str, Tensor]:
    """What of attention trained with that adapter, in the model or away: the memory itself."""
    found: dict[str, Tensor] = {}
    for holder, owner, own in owned(root):
        if owner == name:
            here: dict[str, Any] = own.away or parameters(holder, own)
            prefix = _prefix(root, holder)
            found |= {prefix + key: value for key, value in here.items()}
    return found


def stock_values(root: nn.Module) -> dict[str, Tensor]:
    """What everything that trains was at the injection."""
    found: dict[str, Tensor] = {}
    for holder, _, own in owned(root):
        prefix = _prefix(root, holder)
        found |= {prefix + key: value for key, value in own.stock.items()}
    return found


def sync(root: nn.Module) -> None:
    """Gives the model the trained weights where their adapter acts, and the stock ones elsewhere.

    Memory is exchanged, not overwritten: a graph from before, whose backward comes once the
    weights are back, is not disturbed. `check_switchable` belongs before whatever led here.
    """
    found = list(owned(root))
    layers = projections(root) if found else {}
    for holder, name, own in found:
        acts = any(layer.enabled and name in layer.weights for layer in layers.values())
        if acts == (not own.away):
            continue
        for layer in layers.values():
            layer.frozen = None
        here = parameters(holder, own)
        # a tensor made in inference mode could not be trained
        with torch.inference_mode(False):
            for key, parameter in here.items():
                _exchange(own, key, parameter, acts)


def _exchange(own: Trained, key: str, parameter: nn.Parameter, acts: bool) -> None:
    if acts:
        parameter.data = own.away.pop(key).to(parameter)
    else:
        own.away[key] = parameter.data
        parameter.data = own.stock[key].to(parameter, copy=True)
    parameter.requires_grad_(acts and own.trains)


def set_trains(root: nn.Module, chosen: Iterable[str]) -> None:
    """Which adapters' attention trains; it only does while it is in the model."""
    chosen = set(chosen)
    found = [(name, own, parameters(holder, own)) for holder, name, own in owned(root)]
    for name, own, here in found:
        own.trains = name in chosen
        for parameter in here.values():
            parameter.requires_grad_(own.trains and not own.away)


def end(root: nn.Module, name: str | None) -> None:
    """Puts the stock values back, bit for bit, of one adapter or of all, and freezes them."""
    for holder, owner, own in list(owned(root)):
        if name is not None and owner != name:
            continue
        with torch.no_grad():
            for key, parameter in parameters(holder, own).items():
                parameter.copy_(own.stock[key])
                parameter.requires_grad_(False)
                parameter.grad = None
        del holder.__dict__[RECORD][_KEY][owner]


def _prefix(root: nn.Module, holder: nn.Module) -> str:
    """The plain name of an injected part, to be put before the names in its record."""
    name = next(name for name, module in root.named_modules() if module is holder)
    return f"{plain_name(name)}." if name else ""
