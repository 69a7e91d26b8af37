"""What a family of models is: where its attention hands over, and by which processors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn


class Site(NamedTuple):
    """An attention layer, and the linear layers that consume its output.

    columns: (start, length) of those layers' input that is attention; None: all of it.
    """

    name: str
    attention: nn.Module
    projections: dict[str, nn.Module]  # full name -> layer, PEFT's wrapper included
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`.

    matches: whether a model is of this family.
    sites: its attention layers.
    processor_for: our processor in the place of a stock one, None for one it does not know.
    owns: whether a processor is one of ours.
    joinable: groups of projections of one input (q, k, v) that our processor computes together.
    timesteps: what the forward's timestep is multiplied by to run from 0 to 1000.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    sites: Callable[[nn.Module], Iterator[Site]]
    processor_for: Callable[[Any], Any | None]
    owns: Callable[[Any], bool]
    joinable: Callable[[Any], list[tuple[nn.Module, ...]]]
    timesteps: float = 1.0
