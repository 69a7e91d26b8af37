"""What a family of models is: where its attention hands over, and by which processors.

Most families differ in their blocks alone: the layer that consumes attention is one of a few
attributes of the attention layer (`OUTPUTS`), which `sites` finds. Their file says so in a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import nn

from .clock import Clock

# attributes of attention layers that hold the linear layers behind them: of the layer's own
# tokens, then of those that attend together with them (text)
OUTPUTS = ("to_out", "to_add_out", "to_out_t")


class Site(NamedTuple):
    """An attention layer, and the linear layers that consume its output.

    columns: (start, length) of those layers' input that is attention; None: all of it.
    reason: why there is no such layer, where `projections` is empty.
    unsure: full name -> doubt, of layers that may be such: adapted where `targets` names one.
    """

    name: str
    attention: nn.Module
    projections: dict[str, nn.Module]  # full name -> layer, PEFT's wrapper included
    columns: tuple[int, int] | None = None
    reason: str = "no linear layer of its own consumes it"
    unsure: Mapping[str, str] = MappingProxyType({})


def is_attention(module: nn.Module) -> bool:
    """Whether it is of one of the two classes that diffusers' attention layers derive from."""
    return isinstance(module, (Attention, AttentionModuleMixin))


def processor_of(attention: nn.Module) -> Any | None:
    """Its processor; None where the layer has none: not all are diffusers'."""
    get: Any = getattr(attention, "get_processor", None)
    return getattr(attention, "processor", None) if get is None else get()


def sites(model: nn.Module) -> Iterator[Site]:
    """Every attention layer, with the layers of `OUTPUTS` that it has."""
    for name, module in model.named_modules():
        if is_attention(module):
            yield Site(name, module, outputs(name, module))


def outputs(name: str, attention: nn.Module) -> dict[str, nn.Module]:
    """The layers of `OUTPUTS` by full name; of a list (linear layer, dropout) the first."""
    found: dict[str, nn.Module] = {}
    for attribute in OUTPUTS:
        layer = getattr(attention, attribute, None)
        full = f"{name}.{attribute}" if name else attribute
        if isinstance(layer, nn.ModuleList) and len(layer) > 0:
            found[f"{full}.0"] = layer[0]
        elif isinstance(layer, nn.Module) and not isinstance(layer, (nn.ModuleList, nn.Identity)):
            found[full] = layer
    return found


def _none(processor: Any) -> None:
    return None


def _no(processor: Any) -> bool:
    return False


def _nothing(attention: nn.Module) -> list[tuple[nn.Module, ...]]:
    return []


@dataclass(frozen=True)
class Family:
    """One row of `FAMILIES`.

    holds: names of diffusers' classes; a model that is one, or has one among its parts, is of
        this family.
    timesteps: the forward's timestep on a scale of 0, clean, to 1000, noise.
    sites: its attention layers.
    processor_for: our processor in the place of a stock one, None for one it does not know.
    owns: whether a processor is one of ours.
    joinable: groups of projections of one input (q, k, v) that our processor computes together.
    by_structure: `sites` is a reading of names and shapes, of a model that no row is about.

    Without processors of ours every stock one stays. They call the layer behind attention as a
    module, which is all that adapters need.
    """

    name: str
    holds: tuple[str, ...]
    timesteps: Clock
    sites: Callable[[nn.Module], Iterator[Site]] = sites
    processor_for: Callable[[Any], Any | None] = _none
    owns: Callable[[Any], bool] = _no
    joinable: Callable[[Any], list[tuple[nn.Module, ...]]] = _nothing
    by_structure: bool = False


def class_names(model: nn.Module) -> set[str]:
    """The names of all classes from diffusers that the model and its parts are of."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return {kind.__name__ for kind in kinds if kind.__module__.startswith("diffusers.")}
