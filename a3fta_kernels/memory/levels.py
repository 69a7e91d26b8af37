"""How lean a frozen model runs: what `a3fta ledger` and `a3fta plan` can apply, cheapest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Level:
    """`apply(model)` sets a model up; title says what it does; lean: the options of `lean`."""

    title: str
    apply: Callable[[Any], object]
    lean: dict[str, str] | None = None


class UnsupportedLevelError(ValueError):
    """The model does not have this level."""


def _stock(model: nn.Module) -> None:
    pass


def checkpoint(model: Any) -> None:
    """diffusers' gradient checkpointing; UnsupportedLevelError where the model has none."""
    try:
        model.enable_gradient_checkpointing()
    except (AttributeError, ValueError):
        raise UnsupportedLevelError(
            f"model: expected one with gradient checkpointing, got a {type(model).__name__}"
        ) from None


def _lean(title: str, **options: Any) -> Level:
    def apply(model: Any) -> object:
        from ..lean import lean  # imports diffusers

        try:
            return lean(model, **options)
        except ValueError as error:
            raise UnsupportedLevelError(str(error)) from None

    return Level(f"lean: {title}", apply, options)


# in the order of their time, so that the first that fits is the cheapest
LEVELS = {
    "stock": Level("the model as it is", _stock),
    "exact": _lean("nothing is computed twice", level="exact"),
    "compressed": _lean("exact, inputs of norms and activations in 8 bits", level="compressed"),
    "recompute": _lean("q, k, v and GEGLU's input computed again", level="recompute"),
    "block": _lean("recompute, and the stream inside blocks rebuilt", level="block"),
    "block-int8": _lean("block, inputs of norms in 8 bits", level="block", norms="int8"),
    "checkpointing": Level("diffusers' gradient checkpointing: a second forward", checkpoint),
}
