"""What a family's small model is. One file per family beside this one; `zoo.py` is the table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Draw = Callable[..., Tensor]  # draw(*shape): normal numbers
NOTHING: Mapping[str, Any] = MappingProxyType({})

# what pipelines give the forward as the timestep of a clean sample, and of pure noise
STEPS = (0.0, 1000.0)
SHARE = (0.0, 1.0)
STEPS_LEFT = (1000.0, 0.0)
SHARE_LEFT = (1.0, 0.0)
LOG_SIGMA = (-math.inf, math.inf)


class Small(NamedTuple):
    """A model with random weights that runs in milliseconds, and what is true of it.

    make: builds it. inputs(draw, batch): the arguments of its forward. family: its row in
    `processors.FAMILIES`. timesteps: what its pipeline gives for a clean sample and for pure noise.
    projections: regular expression (whole name) -> how many of the adapted
    layers match; every one matches one. columns: the same, for those that read more than attention.
    idle: the same -> why nothing reads the layer's output, so that its adapter cannot train.
    other: the same -> what its input is, where softmax attention does not return it as it is.
    lean: block class -> how many blocks are rebuilt at level "block"; the rest stays stock. None:
    it has no module that lean knows at any level.
    reads_numbers: where the stock model reads numbers of a tensor, so that it has no ledger and is
    more than one graph. takes_sizes: which sizes it takes from numbers, which leaves it one graph.
    forgets: what the stock model forgets when it is checkpointed. refuses: why it raises then.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[Draw, int], dict[str, Any]]
    family: str
    timesteps: tuple[float, float]
    projections: Mapping[str, int]
    columns: Mapping[str, tuple[int, int]] = NOTHING
    idle: Mapping[str, str] = NOTHING
    other: Mapping[str, str] = NOTHING
    lean: Mapping[str, int] | None = NOTHING
    reads_numbers: str = ""
    takes_sizes: str = ""
    forgets: str = ""
    refuses: str = ""

    def build(self, seed: int = 0) -> nn.Module:
        """The model, always with the same weights and none of them zero, in eval mode."""
        return filled(self.make, seed).eval()

    def batch(self, size: int = 2, seed: int = 1) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        return self.inputs(draw, size)

    def run(self, model: nn.Module, **options: Any) -> Tensor:
        return output(model(**self.batch(**options), return_dict=False))


def filled(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """What `make` makes, always with the same weights and none of them zero."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():  # final layers and gates are made zero
            parameter.add_(torch.randn_like(parameter) * 0.05)
    torch.set_rng_state(state)
    return model


def output(found: Any) -> Tensor:
    """Every tensor that a model returns, as one row of numbers."""
    return torch.cat([tensor.flatten() for tensor in _tensors(found)])


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for part in found:
            yield from _tensors(part)
