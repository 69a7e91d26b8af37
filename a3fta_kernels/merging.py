"""merge and unmerge: adapters without a non-linearity, folded into the projection's weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapters.bottleneck import Tensors
from .projection import AdaptedProjectionMixin, Merged, span
from .tree import adapted, check_unmerged, denoiser, plain_name
from .whereabouts import check_in_memory


def merge(model: Any) -> None:
    """Folds the active adapters into the weights, where the algebra allows it.

        W' = W + sum of s * W @ w_up @ w_down,    b' = b + sum of s * W @ (w_up @ b_down + b_up)

    with s = weight * scale: exact up to rounding for activation="identity". Of adapters on a slice
    of the input's columns W is that slice. A bias is made where one is needed.
    `unmerge` restores the kept weights bit for bit.

    Raises:
        ValueError: an active adapter is not linear (its name and activation are in the message)
            or drops ranks in training, nothing is active, a layer's weight is not a plain
            tensor at hand, PEFT wraps a layer, or the model is merged already. Nothing is
            changed then.
    """
    layers = adapted(model)
    check_unmerged(layers, "merge them")
    check_in_memory(denoiser(model), "merge")
    if not any(layer.active() for layer in layers.values()):
        raise ValueError("model: expected active adapters to merge, got none; see set_adapters")
    wrapped = [n for n, _ in denoiser(model).named_modules() if n.endswith(".base_layer")]
    wrapped = [name for name in map(plain_name, wrapped) if name in layers]
    if wrapped:
        raise ValueError(
            f"model: expected projections without PEFT's layers around them, got {wrapped[0]}: "
            f"a LoRA that is merged later would read the merged weight"
        )
    for name, layer in layers.items():
        _check(name, layer)
    with torch.no_grad():
        for layer in layers.values():
            if layer.active():
                _merge(layer)


def _check(name: str, layer: AdaptedProjectionMixin) -> None:
    for adapter_name in layer.weights if layer.active() else ():
        adapter: Any = layer.adapters[adapter_name]
        if adapter.activation != "identity":
            raise ValueError(
                f"model: expected linear adapters to merge (activation='identity'), got adapter "
                f"{adapter_name!r} with activation={adapter.activation!r} at {name}"
            )
        if adapter.dropout and adapter.training:
            raise ValueError(
                f"model: expected adapters without dropout to merge, or model.eval(), got adapter "
                f"{adapter_name!r} with dropout={adapter.dropout} at {name}"
            )
    reason = layer.unreadable_reason()
    if layer.active() and reason is not None:
        raise ValueError(f"model: expected plain weights to merge into, got {name}: {reason}")


def _merge(layer: AdaptedProjectionMixin) -> None:
    kept = Merged(layer.weight.detach().clone(), _copy(layer.bias))
    wide = torch.float64 if kept.weight.dtype == torch.float64 else torch.float32
    start, length = span(layer, layer.columns)
    w = kept.weight.narrow(1, start, length).to(wide)
    change = torch.zeros_like(w)
    shift = None
    for adapter, weight in layer.active():
        s = weight * adapter.scale
        own: Tensors = adapter()
        w_up, w_down = own.w_up.to(wide), own.w_down.to(wide)
        change += s * ((w @ w_up) @ w_down)
        if own.b_down is not None and own.b_up is not None:
            moved = s * (w @ (w_up @ own.b_down.to(wide) + own.b_up.to(wide)))
            shift = moved if shift is None else shift + moved
    layer.weight.narrow(1, start, length).copy_(w + change)
    if shift is not None:
        bias: Tensor | None = layer.bias
        if bias is None:
            layer.bias = nn.Parameter(shift.to(kept.weight.dtype), requires_grad=False)
        else:
            bias.copy_(bias.to(wide) + shift)
    layer.frozen = None
    layer.merged = kept


def _copy(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def unmerge(model: Any) -> None:
    """Puts the weights from before `merge` back, bit for bit. Without a merge: ValueError."""
    layers = adapted(model)
    merged = [layer for layer in layers.values() if layer.merged is not None]
    if not merged:
        raise ValueError("model: expected merged adapters, got none; merge comes first")
    with torch.no_grad():
        for layer in merged:
            kept = layer.merged
            assert kept is not None
            layer.weight.copy_(kept.weight)
            if kept.bias is None:
                layer.register_parameter("bias", None)
            else:
                layer.bias.copy_(kept.bias)
            layer.merged = None
