"""Adapters beside attention (placement "parallel") in the stages of a block.

    y' = W h + b + d,   d = sum of adapter(x),   x what the attention layer is given

x comes of the state by a norm, as q, k and v do, and is computed again with them; d is only added.
So nothing of these adapters is kept.
"""

from __future__ import annotations

from torch import Tensor, nn

from .. import placements
from ..processors.unet import project_out
from ..projection import AdaptedProjectionMixin
from .rebuild import Reader, Tensors


class Aside:
    """The `aside` of a stage: what the parallel adapters of its projections add.

    Args:
        readers: a projection and what its adapters read, each. Of these only projections count
            that have such adapters now.
        onto: which tensor of the state they are added to in the same op, as its residual; None
            where something comes between the two.
    """

    def __init__(self, *readers: tuple[nn.Module, Reader], onto: int | None = None) -> None:
        self._onto = onto
        self._found: list[tuple[nn.Module, placements.Beside, Reader]] = []
        for module, read in readers:
            found = placements.beside(module)
            if found is not None:
                self._found.append((module, found, read))
        self.modules = tuple(a for _, beside, _ in self._found for a in beside.adapters())

    def __call__(self, state: Tensors, given: Tensors) -> Tensors:
        base = None if self._onto is None else state[self._onto]
        return tuple(beside.add(read(state, given), base) for _, beside, read in self._found)

    def project(
        self, module: nn.Module, h: Tensor, outs: Tensors, residual: Tensor | None = None
    ) -> Tensor:
        """module(h) [+ residual], with these adapters: `outs` ends in what was made by a call."""
        made = outs[len(outs) - len(self._found) :]
        for (own, _, _), aside in zip(self._found, made, strict=True):
            if own is module:
                if isinstance(module, AdaptedProjectionMixin):
                    return module(h, residual=aside, acted=True)
                return module(h, acted=True) + aside  # PEFT's wrappers hand it on
        return module(h) if residual is None else project_out(module, h, residual)
