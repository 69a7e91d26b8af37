"""A linear layer becomes an adapted one in place, and back, by its class.

The module, its parameters, its hooks and its state-dict names stay; `restore` leaves no trace.
"""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

from .forwards import check_forward, rebind_forward
from .projection import AdaptedProjection, AdaptedProjectionMixin, Columns, stock_class

# the attributes of an adapted layer beside its adapters
_OWN = (
    "acting", "enabled", "backend", "columns", "merged", "frozen", "banks", "source", "resting",
)  # fmt: skip


class _AdaptedSubclass(AdaptedProjectionMixin):
    """An adapted layer of another linear class, made on demand: pickles by its stock class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (stock_class(self),), self.__getstate__()


@functools.cache
def adapted_class(stock: Any) -> Any:
    """The class that an adapted layer of class `stock` has."""
    if stock is nn.Linear:
        return AdaptedProjection
    return type(f"Adapted{stock.__name__}", (_AdaptedSubclass, stock), {"__module__": __name__})


def why_not_adaptable(linear: nn.Linear) -> str | None:
    """Why `adapt` cannot change this layer's class; None where it can."""
    stock: Any = type(linear)
    if isinstance(linear, AdaptedProjectionMixin):
        return None
    taken = [name for name in (*_OWN, "weights", "adapters") if hasattr(linear, name)]
    if taken:
        return f"its projection is a {stock.__name__}, which has a {taken[0]!r} of its own"
    try:  # Python asks for the same layout, which a mixin in front of nn.Linear may change
        object.__setattr__(object.__new__(stock), "__class__", adapted_class(stock))
    except TypeError:
        return f"its projection is a {stock.__name__}, whose class cannot be changed"
    return None


def _blank(stock: type) -> nn.Module:
    cls = adapted_class(stock)
    return cls.__new__(cls)


def adapt(
    linear: nn.Linear, backend: str = "auto", columns: Columns = None
) -> AdaptedProjectionMixin:  # fmt: skip
    """Turns `linear` into an adapted projection, in place, without an adapter yet.

    columns: (start, length), the slice of its input that the adapters act on; None: all.
    """
    check_forward(linear)
    stock: Any = type(linear)
    linear.__class__ = adapted_class(stock)
    projection = cast(AdaptedProjectionMixin, linear)
    projection.adapters = nn.ModuleDict()
    projection.adapters.train(linear.training)
    projection.choose({})
    projection.enabled = True
    projection.backend = backend
    projection.columns = columns
    projection.merged = None
    projection.frozen = None
    projection.banks = None
    projection.source = None
    projection.resting = ()
    rebind_forward(projection)
    return projection


def restore(projection: AdaptedProjectionMixin) -> None:
    """Gives the layer its class back and removes everything that `adapt` added."""
    projection.__class__ = stock_class(projection)
    del projection._modules["adapters"]
    for name in _OWN:
        del projection.__dict__[name]
    rebind_forward(projection)


def check_restorable(projection: AdaptedProjectionMixin) -> None:
    """Raises ValueError where something (a parametrization) changed the class since `adapt`."""
    expected: Any = adapted_class(stock_class(projection))
    if type(projection) is not expected:
        raise ValueError(
            f"model: expected layers of class {expected.__name__}, got a "
            f"{type(projection).__name__}; undo what changed the class after injection first"
        )
