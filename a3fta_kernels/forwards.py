"""What a layer's forward is: hooks, a class changed in place under them, layers around it; and the
arguments that a hook before it reads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module, but: tuple[type, ...] = ()) -> bool:
    """Whether the module carries hooks, of other classes than these, or a forward of its own."""
    state = module.__dict__
    if "forward" in state:
        return True
    for name in _HOOKS:  # most are empty, and this is asked of many modules in every forward
        hooks = state[name]
        if hooks and any(not isinstance(hook, but) for hook in hooks.values()):
            return True
    return False


def inside(layer: Any) -> Any:
    """The layer inside PEFT's wrappers."""
    *_, last = wrapped(layer)
    return last


def wrapped(layer: Any) -> Iterator[Any]:
    """The layer and what PEFT's wrappers hold, from the outermost in."""
    yield layer
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer
        yield layer


class Argument(NamedTuple):
    """An argument of a module's forward."""

    name: str
    place: int

    def given(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Its value in a call; None where it has none."""
        place = args[self.place] if len(args) > self.place else None
        return kwargs.get(self.name, place)


def arguments(module: nn.Module) -> dict[str, Argument]:
    """Those of the forward, by name, in their order."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {name: Argument(name, place) for place, name in enumerate(names)}


def check_forward(module: nn.Module) -> None:
    """Raises ValueError where the instance carries a forward that `adapt` cannot follow."""
    if "forward" in module.__dict__ and not _bound_forwards(module):
        raise ValueError(
            f"model: expected layers whose forward is their class's, got a {type(module).__name__} "
            f"whose forward was replaced by {module.__dict__['forward']!r}; inject first, then "
            f"wrap the layer"
        )


def _bound_forwards(module: nn.Module) -> list[tuple[Any, str]]:
    """Where hooks (accelerate, diffusers) keep the module's own bound forward."""
    places: list[tuple[Any, str]] = [(module, "forward"), (module, "_old_forward")]
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        places += [(reference, "forward"), (reference, "original_forward")]
    found = []
    for holder, name in places:
        value = vars(holder).get(name)
        own = isinstance(value, MethodType) and value.__self__ is module
        if own and value.__name__ == "forward":
            found.append((holder, name))
    return found


def rebind_forward(module: nn.Module) -> None:
    for holder, name in _bound_forwards(module):
        vars(holder)[name] = MethodType(type(module).forward, module)
