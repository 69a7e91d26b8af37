"""How lean a frozen model runs: what `a3fta ledger` and `a3fta plan` can apply, cheapest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Level:
    """`apply(model)` sets a model up; title says what it does."""

    title: str
    apply: Callable[[Any], object]


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


# in the order of their time, so that the first that fits is the cheapest
LEVELS = {
    "stock": Level("the model as it is", _stock),
    "checkpointing": Level("diffusers' gradient checkpointing: a second forward", checkpoint),
}
