"""What a family's small model is. One file per family beside this one; `zoo.py` is the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]  # draw(*shape): normal numbers


class Small(NamedTuple):
    """A model with random weights that runs in milliseconds.

    make: builds it. inputs(draw, batch): the arguments of its forward. family: its row in
    `processors.FAMILIES`. projections: regular expression (whole name) -> how many of the adapted
    layers match; every one matches one. columns: the same, for those that read more than attention.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[Draw, int], dict[str, Any]]
    family: str
    projections: dict[str, int]
    columns: Mapping[str, tuple[int, int]] = MappingProxyType({})

    def build(self, seed: int = 0) -> nn.Module:
        """The model, always with the same weights and none of them zero, in eval mode."""
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # final layers and gates are made zero
                parameter.add_(torch.randn_like(parameter) * 0.05)
        torch.set_rng_state(state)
        return model

    def batch(self, size: int = 2, seed: int = 1) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return self.inputs(draw, size)

    def run(self, model: nn.Module, **options: Any) -> Tensor:
        return output(model(**self.batch(**options), return_dict=False))


def output(found: Any) -> Tensor:
    """The first tensor of what a model returns."""
    while not isinstance(found, Tensor):
        found = found[0]
    return found
