"""Lean modules: stock modules whose class was changed in place, and back.

A module keeps its parameters, its hooks, its names in a state dict and its identity; only the
forward is another. What the lean forward needs to know is one `Settings` on the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..adapters import BottleneckAdapter
from ..forwards import check_forward, has_hooks, rebind_forward
from ..placements import Hand

SETTINGS = "_a3fta_lean"
LEVELS = ("off", "exact", "recompute", "block", "compressed")


@dataclass(frozen=True)
class Settings:
    """level: of LEVELS. norms: how inputs of normalisations are kept, of `ops.validate.KEEPS`."""

    level: str
    norms: str = "input"

    def __str__(self) -> str:
        narrow = self.norms == "int8" and self.level != "compressed"
        return f"{self.level}, norms in 8 bits" if narrow else self.level

    @property
    def activations(self) -> str:
        """How inputs of activations are kept."""
        return "int8" if self.level == "compressed" else "input"


class LeanModule(nn.Module):
    """Base of the lean classes: `class LeanX(LeanModule, X)`, with a forward of its own.

    Their `__name__` is X's, by which diffusers (`compile_repeated_blocks`) and accelerate (the
    blocks that FSDP wraps) look for blocks; pickle goes by `__qualname__`.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        first, *others = cls.__bases__
        if others and issubclass(first, LeanModule):  # else what others make of ours
            cls.__name__ = others[-1].__name__

    @property
    def settings(self) -> Settings:
        # PEFT builds layers of its own from the class of the one they stand beside
        return cast(Settings, self.__dict__.get(SETTINGS, Settings("exact")))


def swap(module: nn.Module, lean: type[LeanModule], settings: Settings) -> None:
    """Gives the module a lean class, or a lean module other settings."""
    check_forward(module)
    module.__class__ = cast(Any, lean)
    module.__dict__[SETTINGS] = settings
    rebind_forward(module)


def restore(module: LeanModule) -> None:
    """Gives the module the class it had."""
    order = type(module).__mro__
    module.__class__ = cast(Any, order[order.index(LeanModule) + 1])
    module.__dict__.pop(SETTINGS, None)
    rebind_forward(module)


def every(*modules: nn.Module) -> list[nn.Module]:
    """These modules and all inside them, in any order; one in two places comes twice.

    Blocks ask in every forward, and `modules()` takes its way through a generator for each level.
    """
    found, ahead = [], list(modules)
    while ahead:
        module = ahead.pop()
        found.append(module)
        ahead += [m for m in module._modules.values() if m is not None]
    return found


def trains(*modules: nn.Module) -> bool:
    """Whether a parameter of these modules themselves asks for a gradient."""
    for module in modules:
        for p in module._parameters.values():
            if p is not None and p.requires_grad:
                return True
    return False


def hooks_inside(block: nn.Module) -> str | None:
    """The reason why a block with hooks on a module inside is left to the stock forward: there
    each module runs once in a forward, with the inputs and outputs that a hook expects. Our own,
    for adapters beside attention, have their place in the stages."""

    def hooked(module: nn.Module) -> bool:
        return module is not block and has_hooks(module, but=(Hand,))

    if not any(hooked(module) for module in every(block)):
        return None
    name = next(name for name, module in block.named_modules() if hooked(module))
    return f"a module inside carries hooks ({name})"


def drops(module: nn.Module, adapters: bool = False) -> bool:
    """Whether something in the module draws random numbers in a forward, so that no second one is
    equal. In stages adapters do not count: see `adapters.reruns`."""
    return module.training and any(
        m.training and (dropout(m) > 0 or (adapters and _draws(m))) for m in every(module)
    )


def has_dropout(module: nn.Module) -> bool:
    """Whether `drops` may say so in training."""
    return any(dropout(m) > 0 for m in every(module))


def _draws(module: nn.Module) -> bool:
    return isinstance(module, BottleneckAdapter) and (module.dropout > 0 or module.drop_path > 0)


def dropout(module: nn.Module) -> float:
    """The rate at which the module itself drops in training. Adapters do not count."""
    if isinstance(module, BottleneckAdapter):
        return 0.0
    rate: Any = None
    if isinstance(module, nn.modules.dropout._DropoutNd):
        rate = module.p
    # most have none, for which a module's own getattr looks in vain, and slowly
    elif "dropout" in module.__dict__ or hasattr(type(module), "dropout"):
        rate = module.dropout
    return float(rate) if isinstance(rate, (int, float)) else 0.0
