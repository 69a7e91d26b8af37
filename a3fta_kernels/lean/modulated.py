"""What blocks share whose norms and residuals are modulated by the timestep (SD3, Flux).

    modulations = linear(silu(temb)), in chunks (B, C): shifts, scales, gates
    n = norm(x) * (1 + scale) + shift;  x' = x + gate * f(n)

The modulations are made once per forward and given to all stages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import feed_forward
from .rebuild import Reader, Stage, Tensors


def modulations(norm: Any, temb: Tensor, count: int) -> Tensors:
    """The `count` chunks, (B, 1, C) each."""
    return norm.linear(norm.silu(temb)).unsqueeze(1).chunk(count, dim=-1)


def modulate(norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return norm(x) * (1 + scale) + shift


def reader(norm: nn.Module, state: int, at: int) -> Reader:
    """What a layer reads of that state: normalised, shifted and scaled by what is given there."""
    return lambda states, given: modulate(norm, states[state], given[at], given[at + 1])


def heads(layer: nn.Module, norm: nn.Module | None, x: Tensor, head_dim: int) -> Tensor:
    """The layer's output (B, L, H, D), normalised over D where the model has a norm for it."""
    y = layer(x).unflatten(-1, (-1, head_dim))
    return y if norm is None else norm(y)


def clipped(x: Tensor) -> Tensor:
    """As the models do: float16 has no room for their largest values."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def feed_forward_stage(branches: list[tuple[nn.Module, Any, int]]) -> Stage:
    """One feed-forward for each of the first states.

    A branch is the norm, the feed-forward, and where shift, scale and gate begin in `given`.
    """

    def head(state: Tensors, given: Tensors) -> Tensors:
        return tuple(
            feed_forward.widen(ff, modulate(norm, x, given[at], given[at + 1]))
            for (norm, ff, at), x in zip(branches, state, strict=False)
        )

    def core(parts: Tensors, given: Tensors) -> Tensors:
        return tuple(
            feed_forward.activate(ff, p) for (_, ff, _), p in zip(branches, parts, strict=True)
        )

    def tail(outs: Tensors, state: Tensors, given: Tensors) -> Tensors:
        after = tuple(
            x + given[at + 2] * feed_forward.narrow(ff, y)
            for (_, ff, at), y, x in zip(branches, outs, state, strict=False)
        )
        return (*after, *state[len(branches) :])

    reads = [m for norm, ff, _ in branches for m in (norm, ff.net[0])]
    return Stage(head, core, tail, reads, [m for _, ff, _ in branches for m in ff.net[1:]])
