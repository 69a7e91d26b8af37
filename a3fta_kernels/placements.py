"""Where an adapter sits: in front of the projection, behind it, or beside attention as a whole.

The method is "pre": h' = h + adapter(h), y = W h' + b, in one op with the projection. The other two
are what it is compared with, an op of their own behind it:

    post      y = W h + b,   y' = y + adapter(y)
    parallel  y = W h + b,   y' = y + adapter(x),   x what the attention layer itself was given

Behind a feed-forward or an attention sublayer: Houlsby et al., "Parameter-Efficient Transfer
Learning for NLP" (ICML 2019). Beside it: He et al., "Towards a Unified View of Parameter-Efficient
Transfer Learning" (ICLR 2022).

x comes by a hook on the attention layer, and the projection takes it: both run in one forward of
the block, and so in one that a checkpoint runs again. Whoever computes attention without a call of
its layer computes these adapters too, by `Beside`, and tells the projection so (`acted`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import ops
from .adapters import BottleneckAdapter
from .bank import Bank
from .forwards import Argument, arguments, inside, wrapped
from .ops.rule import autocast_dtype, cast
from .stack import Stack, Weighted, delta, stacks

# what attention layers call their tokens of the second kind (text), and the layers that read
# either kind first
_SECOND = "encoder_hidden_states"
_QUERIES = ("to_q", "to_query", "to_qkv", "to_qkv_mlp_proj", "img_qkv_proj")
_SECOND_QUERIES = {"to_add_out": "add_q_proj", "to_out_t": "to_q_t"}


class Input(NamedTuple):
    """What a parallel adapter reads: an argument of its attention layer, and its channels."""

    argument: Argument
    channels: int


def input_of(attention: nn.Module, attribute: str) -> Input | None:
    """The input of an attention layer that belongs to its projection `attribute`; None: unknown."""
    second = _SECOND_QUERIES.get(attribute)
    ending = _SECOND if second else ""
    argument = next((x for x in arguments(attention).values() if x.name.endswith(ending)), None)
    for name in (second,) if second else _QUERIES:
        query = inside(getattr(attention, name, None))
        if argument is not None and isinstance(query, nn.Linear):
            return Input(argument, query.in_features)
    return None


class Hand:
    """A hook before an attention layer: hands its input to the projection behind it.

    It does not keep the projection alive, which others may take out of the model.
    """

    def __init__(self, layer: Any, argument: Argument) -> None:
        self._layer = weakref.ref(layer)
        self.argument = argument

    @property
    def layer(self) -> Any:
        return self._layer()

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        layer = self.layer
        if layer is None:
            return
        if beside(layer) is not None:
            layer.source = self.argument.given(args, kwargs)
        elif layer.source is not None:  # of a forward that an exception cut off
            layer.source = None

    def __reduce__(self) -> Any:
        # a copy is of the copied layer
        return (Hand, (self.layer, self.argument)) if self.layer is not None else (_nothing, ())


def _nothing() -> Callable[..., None]:
    """What a copy has in place of a hook whose layer is gone."""
    return _pass


def _pass(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    pass


def follow_input(attention: nn.Module, layer: Any, argument: Argument) -> None:
    """From now on the layer gets what the attention layer in front of it is given."""
    hooks = [h for h in attention._forward_pre_hooks.values() if isinstance(h, Hand)]
    if not any(hook.layer is layer for hook in hooks):
        attention.register_forward_pre_hook(Hand(layer, argument), with_kwargs=True)


def unfollow_inputs(root: nn.Module) -> None:
    """Removes what `follow_input` added for layers that have no parallel adapter any more, or are
    no part of the model."""
    modules = list(root.modules())
    left = {id(module) for module in modules if _has_parallel(module)}
    for module in modules:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, Hand) and id(hook.layer) not in left:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key)


def _has_parallel(layer: Any) -> bool:
    adapters = getattr(layer, "adapters", None)
    held = adapters.values() if isinstance(adapters, nn.ModuleDict) else ()
    return any(isinstance(a, BottleneckAdapter) and a.config.placement == "parallel" for a in held)


def split(active: Sequence[Weighted], placement: str) -> list[Weighted]:
    """Those of the active adapters that sit there."""
    return [pair for pair in active if pair[0].config.placement == placement]


def why_apart(active: Sequence[Weighted]) -> str | None:
    """Why an adapter and its projection cannot be one op; None where both are in front of it."""
    if split(active, "post"):
        return "its adapter reads what the projection gives"
    if split(active, "parallel"):
        return "its adapter reads what attention is given"
    return None


def in_front(h: Tensor, found: Sequence[Stack], backend: str, banks: Sequence[Bank] = ()) -> Tensor:
    """h + the adapters of h + of the banks the one that each sample has."""
    adapted = h
    for bank in banks:  # one after the other, as no sample has adapters in two
        adapted = bank(adapted, backend)
    for stack in found:
        if adapted is not h or stack.norm:
            adapted = adapted + delta(h.to(adapted.dtype), stack)
            continue
        adapted = ops.adapter(
            h, stack.w_down, stack.w_up, stack.b_down, stack.b_up, scale=stack.scale,
            activation=stack.activation, gamma=stack.gamma, beta=stack.beta, backend=backend,
        )  # fmt: skip
    return adapted


class Beside(NamedTuple):
    """The adapters of a projection that read what attention is given: those that act now."""

    active: Sequence[Weighted]
    banks: Sequence[Bank]  # or these, each sample with its own
    backend: str

    # no property: torch.compile of torch 2.10 reads none of a named tuple
    def adapters(self) -> list[nn.Module]:
        return [*(a for a, _ in self.active), *(a for bank in self.banks for a in bank.adapters)]

    def add(self, x: Tensor, base: Tensor | None) -> Tensor:
        """base (..., N) + adapter(x) of each, x (..., C); without a base adapter(x)."""
        found = base
        # a layer may give more digits than autocast computes in
        apart = base is None or base.dtype != autocast_dtype(x)
        for stack in stacks(list(self.active), x):
            if apart or stack.norm:
                found = _sum(found, delta(x, stack))
                continue
            found = ops.adapter(
                x, stack.w_down, stack.w_up, stack.b_down, stack.b_up, base=found,
                scale=stack.scale, activation=stack.activation, gamma=stack.gamma,
                beta=stack.beta, backend=self.backend,
            )  # fmt: skip
        for bank in self.banks:
            onto = x.new_zeros(*x.shape[:-1], bank.outputs) if apart else found
            added = bank(x, self.backend, onto)
            found = _sum(found, added) if apart else added
        assert found is not None
        return found


def _sum(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def beside(layer: nn.Module) -> Beside | None:
    """What acts beside attention in the layer's next forward, in all of PEFT's wrappers around it.

    None where nothing does.
    """
    active: list[Weighted] = []
    banks: list[Bank] = []
    backend = "auto"
    for part in wrapped(layer):
        if not hasattr(part, "acting_banks"):
            continue
        backend = part.backend
        chosen = part.acting_banks()
        if chosen is None:
            active = [*split(part.active(), "parallel"), *active]
        else:
            banks += (bank for bank in chosen if bank.placement == "parallel")
    return Beside(active, banks, backend) if active or banks else None


def behind(layer: Any, y: Tensor, active: Sequence[Weighted], banks: Sequence[Bank] = ()) -> Tensor:
    """The projection's output with the adapters behind and beside it, of these."""
    post = [bank for bank in banks if bank.placement == "post"]
    found = in_front(y, stacks(split(active, "post"), y), layer.backend, post)
    parallel = split(active, "parallel"), [b for b in banks if b.placement == "parallel"]
    if not any(parallel):
        return found
    source, layer.source = layer.source, None
    return Beside(*parallel, layer.backend).add(cast(_rows(source, y), y.dtype), found)


def _rows(x: Any, y: Tensor) -> Tensor:
    """What attention was given, with the rows that y has."""
    if not isinstance(x, Tensor):
        raise RuntimeError(
            "placement: expected a forward of the attention layer, whose input a parallel adapter "
            "reads; got one of the projection alone"
        )
    if x.dim() == 4 and y.dim() == 3:  # an image (B, C, H, W), which attention flattens
        x = x.flatten(2).transpose(1, 2)
    if x.shape[:-1] != y.shape[:-1]:
        raise RuntimeError(
            f"placement: expected attention that hands over as many rows as it is given, for a "
            f"parallel adapter, got {tuple(x.shape[:-1])} and {tuple(y.shape[:-1])}; choose "
            f"'pre' or 'post', or other targets"
        )
    return x
