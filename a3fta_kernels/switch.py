"""Which adapters act, which train, and the frozen state for inference."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from . import attention_weights
from .checks import describe
from .projection import AdaptedProjectionMixin
from .tree import (
    adapted,
    adapter_names,
    check_known,
    check_one_batch,
    check_unmerged,
    denoiser,
    projections,
)
from .whereabouts import check_in_memory, check_unstreamed


def set_adapters(
    model: Any,
    names: str | Sequence[str],
    weights: float | Sequence[float] | None = None,
) -> None:
    """Makes exactly these adapters act, in parallel: h' = h + sum of weight_i * adapter_i(h).

    `weights`: one number for all, one per name, or None for 1. No names: none acts.

    Raises:
        TypeError, ValueError: a name the model does not have (the message lists the known), a
            weight that is no finite number, merged layers, or attention that trains and cannot
            be exchanged (on disk, sharded, parametrized). Nothing is changed then.
    """
    layers = adapted(model)
    chosen = _names(names)
    check_known("names", chosen, layers.values())
    factors = _weights(weights, len(chosen))
    check_unmerged(layers, "choose adapters")
    check_one_batch(layers, "choose adapters")
    _check_switchable(denoiser(model))
    for layer in layers.values():
        pairs = zip(chosen, factors, strict=True)
        layer.choose({n: w for n, w in pairs if n in layer.adapters})
    attention_weights.sync(denoiser(model))


def enable_adapters(model: Any) -> None:
    """Lets the adapters act again after `disable_adapters`."""
    _enable(model, True)


def disable_adapters(model: Any) -> None:
    """Makes the model compute what it did before injection; the adapters stay."""
    _enable(model, False)


def _enable(model: Any, value: bool) -> None:
    layers = adapted(model)
    check_unmerged(layers, "switch them on or off")
    _switch(denoiser(model), dict.fromkeys(layers.values(), value))


def _switch(root: nn.Module, enabled: Mapping[AdaptedProjectionMixin, bool]) -> None:
    _check_switchable(root)
    for layer, value in enabled.items():
        layer.enabled = value
    attention_weights.sync(root)


def _check_switchable(root: nn.Module) -> None:
    """Raises ValueError where attention that trains cannot be exchanged for the stock weights."""
    action = "switch attention that trains"
    if attention_weights.check_switchable(root, action):
        check_unstreamed(root, action)


@contextlib.contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Adapters off inside the block: the teacher, where a loss compares with the stock model.

    Attention that trains beside an adapter has its stock weights inside, which are copied to the
    device each time. There a graph from before must have its backward after the block, and a
    graph made inside must have it inside. A backward reads the weights that the model has by then;
    on the other side gradients with respect to inputs are wrong, and autograd does not notice.

    Takes effect for the forwards inside; with gradient checkpointing their backward belongs
    inside too, because it runs the forward again.
    """
    layers = adapted(model)
    check_unmerged(layers, "switch them off")
    root, before = denoiser(model), {layer: layer.enabled for layer in layers.values()}
    _switch(root, dict.fromkeys(before, False))
    try:
        yield
    finally:
        # one that was ejected meanwhile is a stock layer again
        left = {x: on for x, on in before.items() if isinstance(x, AdaptedProjectionMixin)}
        _switch(root, left)


def trainable_parameters(model: Any) -> Iterator[nn.Parameter]:
    """The parameters that train, for an optimizer or for clipping: those of the adapters, then
    those of attention that trains beside them; a new iterator at every call.

    Warns where adapters were frozen by someone else (PEFT's `add_adapter` does that, and
    `set_trainable` undoes it), and where attention is left out because its adapter does not act.

    Raises ValueError where diffusers' `fuse_qkv_projections` put a copy in the place of attention
    that trains.
    """
    layers = adapted(model)
    attention_weights.check_apart(denoiser(model), "train them")
    training: list[nn.Parameter] = []
    frozen: dict[str, None] = {}
    away: list[str] = []
    for layer in layers.values():
        for name, adapter in layer.adapters.items():
            parameters = list(adapter.parameters())
            training += [p for p in parameters if p.requires_grad]
            if name not in layer.resting and not all(p.requires_grad for p in parameters):
                frozen[name] = None
    for holder, name, own in attention_weights.owned(denoiser(model)):
        attention = list(attention_weights.parameters(holder, own).values())
        training += [p for p in attention if p.requires_grad]
        if own.trains and own.away:
            away.append(name)
        elif own.trains and not all(p.requires_grad for p in attention):
            frozen[name] = None
    if frozen:
        warnings.warn(
            f"the adapters {', '.join(frozen)} are frozen and will not train; call "
            f"set_trainable(model) (PEFT's add_adapter freezes all other parameters)",
            stacklevel=2,
        )
    if away:
        warnings.warn(
            f"the attention that trains beside the adapters {', '.join(away)} is left out, because "
            f"they do not act; enable the adapters first (enable_adapters, set_adapters)",
            stacklevel=2,
        )
    return iter(training)


def set_trainable(model: Any, names: str | Sequence[str] | None = None) -> None:
    """Lets the named adapters train, and the model's other adapters not. None: all of them.

    With an adapter goes the attention that trains beside it. The model's own other parameters,
    and those of PEFT, stay as they are.
    """
    layers = adapted(model)
    chosen = adapter_names(layers.values()) if names is None else _names(names)
    check_known("names", chosen, layers.values())
    attention_weights.set_trains(denoiser(model), chosen)
    for layer in layers.values():
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(name in chosen)
        layer.resting = tuple(n for n in layer.adapters if n not in chosen)


def freeze_for_inference(model: Any) -> int:
    """Computes V = scale * weight @ w_up of every projection once and keeps it.

    Holds until `train()`, loading, `set_adapters`, `merge`, a move of the model, or `unfreeze`.
    Weights that are changed in other ways (an optimizer, `.data`) are not seen meanwhile.
    Returns the number of projections that keep something: on the reference backend, with
    adapters of different activations, and where the weight cannot be read, there is nothing.
    """
    layers = adapted(model)
    check_in_memory(denoiser(model), "freeze_for_inference")
    return sum(layer.freeze() for layer in layers.values())


def unfreeze(model: Any) -> None:
    """Drops what `freeze_for_inference` kept."""
    for layer in projections(model).values():
        layer.frozen = None


def _names(names: Any) -> list[str]:
    listed = isinstance(names, Iterable) and not isinstance(names, Mapping)
    chosen: list[Any] = [names] if isinstance(names, str) else list(names) if listed else [None]
    if not all(isinstance(n, str) for n in chosen):
        raise TypeError(f"names: expected a name or a list of names, got {describe(names)}")
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"names: expected each name once, got {chosen}")
    return chosen


def _weights(weights: Any, count: int) -> list[float]:
    if weights is None:
        weights = 1.0
    values = [weights] * count if isinstance(weights, (int, float)) else weights
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"weights: expected a number or a list of them, got {describe(weights)}")
    if len(values) != count:
        raise ValueError(f"weights: expected one for each of {count} names, got {len(values)}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"weights: expected numbers, got {describe(value)}")
        if not math.isfinite(value):
            raise ValueError(f"weights: expected finite numbers, got {value!r}")
    return [float(value) for value in values]
