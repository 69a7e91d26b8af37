"""merge and unmerge: adapters without a non-linearity, folded into the projection's weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.bottleneck import Tensors
from .ops.rule import acc_dtype
from .placements import split
from .projection import AdaptedProjectionMixin, Merged, span
from .stack import Weighted
from .tree import (
    adapted,
    check_kinds,
    check_one_batch,
    check_unmerged,
    denoiser,
    plain_name,
)
from .whereabouts import check_in_memory


def merge(model: Any) -> None:
    """Folds the active adapters into the weights, where the algebra allows it.

        W' = W + sum of s * W @ w_up @ w_down,    b' = b + sum of s * W @ (w_up @ b_down + b_up)

    with s = weight * scale: exact up to rounding for activation="identity". Of adapters on a slice
    of the input's columns W is that slice. A bias is made where one is needed. Of adapters behind
    the projection (placement="post"), which then multiply what the others made of it:

        W'' = W' + sum of s * w_up @ w_down @ W'
        b'' = b' + sum of s * (w_up @ (w_down @ b' + b_down) + b_up)

    `unmerge` restores the kept weights bit for bit.

    Raises:
        ValueError: an active adapter is not linear (its name and activation are in the message)
            or drops ranks in training, nothing is active, a layer's weight is not a plain
            tensor at hand, PEFT wraps a layer, or the model is merged already. Nothing is
            changed then.
    """
    layers = adapted(model)
    check_unmerged(layers, "merge them")
    check_one_batch(layers, "merge adapters")
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
        check_linear(name, adapter_name, layer.adapters[adapter_name])
    reason = layer.unreadable_reason()
    if layer.active() and reason is not None:
        raise ValueError(f"model: expected plain weights to merge into, got {name}: {reason}")


def check_linear(layer: str, name: str, adapter: Any) -> None:
    """Raises ValueError where the adapter cannot be folded into a weight."""
    check_kinds(
        "model", "merge", layer, name, adapter, "linear", "not beside", "timeless", "of h itself",
        "whole",
    )  # fmt: skip


def _merge(layer: AdaptedProjectionMixin) -> None:
    kept = copied(layer)
    put(layer, folded(kept, span(layer, layer.columns), layer.active()))
    layer.frozen = None
    layer.merged = kept


def folded(stock: Merged, columns: tuple[int, int], active: Sequence[Weighted]) -> Merged:
    """The weight and bias with the adapters on these columns in them, as `merge` says."""
    weight, bias = stock
    wide = acc_dtype(weight.dtype)
    w = weight.narrow(1, *columns).to(wide)
    change = torch.zeros_like(w)
    shift = None
    for adapter, factor in split(active, "pre"):
        s = factor * adapter.scale
        own: Tensors = adapter()
        w_up, w_down = own.w_up.to(wide), own.w_down.to(wide)
        change += s * ((w @ w_up) @ w_down)
        if own.b_down is not None:
            inner = w_up @ own.b_down.to(wide)
            moved = s * (w @ (inner if own.b_up is None else inner + own.b_up.to(wide)))
            shift = moved if shift is None else shift + moved
    weight = weight.clone()
    weight.narrow(1, *columns).copy_(w + change)
    if shift is not None:
        moved = shift if bias is None else bias.to(wide) + shift
        bias = moved.to(weight.dtype if bias is None else bias.dtype)
    return _behind(Merged(weight, bias), split(active, "post"), wide)


def _behind(stock: Merged, active: Sequence[Weighted], wide: torch.dtype) -> Merged:
    """The weight and bias with adapters behind the projection in them."""
    if not active:
        return stock
    w = stock.weight.to(wide)
    b = w.new_zeros(len(w)) if stock.bias is None else stock.bias.to(wide)
    weight, bias = w.clone(), b.clone()
    for adapter, factor in active:
        s = factor * adapter.scale
        own: Tensors = adapter()
        w_up, w_down = own.w_up.to(wide), own.w_down.to(wide)
        weight += s * (w_up @ (w_down @ w))
        inner = w_down @ b if own.b_down is None else w_down @ b + own.b_down.to(wide)
        bias += s * (w_up @ inner if own.b_up is None else w_up @ inner + own.b_up.to(wide))
    dtype = stock.weight.dtype
    if stock.bias is None and not bias.any():
        return Merged(weight.to(dtype), None)
    return Merged(weight.to(dtype), bias.to(dtype if stock.bias is None else stock.bias.dtype))


def copied(linear: nn.Linear) -> Merged:
    """The layer's weight and bias, in memory of their own."""
    bias: Tensor | None = linear.bias
    return Merged(linear.weight.detach().clone(), None if bias is None else bias.detach().clone())


def put(linear: nn.Linear, tensors: Merged) -> None:
    """Writes weight and bias; makes the latter where it is missing, removes it where it was."""
    linear.weight.copy_(tensors.weight)
    bias: Tensor | None = linear.bias
    if tensors.bias is None:
        linear.register_parameter("bias", None)
    elif bias is None:
        linear.bias = nn.Parameter(tensors.bias, requires_grad=False)
    else:
        bias.copy_(tensors.bias)


def unmerge(model: Any) -> None:
    """Puts the weights from before `merge` back, bit for bit. Without a merge: ValueError."""
    layers = adapted(model)
    merged = [layer for layer in layers.values() if layer.merged is not None]
    if not merged:
        raise ValueError("model: expected merged adapters, got none; merge comes first")
    with torch.no_grad():
        for layer in merged:
            assert layer.merged is not None
            put(layer, layer.merged)
            layer.merged = None
