"""Parallel adapters as one: stacked along the rank, where their formulas agree.

h' = h + sum over i of weight_i * scale_i * adapter_i(h)
   = h + act(h @ [w_down_i].T + [b_down_i]) @ [weight_i * scale_i * w_up_i].T + ...
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapters import BottleneckAdapter
from .adapters.bottleneck import Tensors
from .ops.activations import activate

Weighted = tuple[BottleneckAdapter, float | Tensor]  # an adapter and its mixing weight


class Stack(NamedTuple):
    """Parallel adapters of one activation as one adapter: stacked along the rank."""

    w_down: Tensor
    w_up: Tensor
    b_down: Tensor | None
    b_up: Tensor | None
    scale: float
    activation: str
    gamma: Tensor | None
    beta: Tensor | None
    norm: bool  # whether h is normalised first


def stacks(active: list[Weighted], h: Tensor | None) -> list[Stack]:
    """The active adapters, stacked along the rank, one stack per activation and norm.

    With h, gamma and beta are for its samples: the timestep's, and dropped ranks.
    """
    groups: dict[tuple[str, bool], list[Weighted]] = {}
    for adapter, weight in active:
        kind = (adapter.activation, adapter.config.layer_norm)
        groups.setdefault(kind, []).append((adapter, weight))
    return [_stack(group, *kind, h) for kind, group in groups.items()]


def _stack(group: list[Weighted], activation: str, norm: bool, h: Tensor | None) -> Stack:
    if len(group) == 1 and not torch.compiler.is_compiling():
        adapter, weight = group[0]
        w_down, w_up, b_down, b_up, gamma, beta = adapter(h)
        scale = adapter.scale * float(weight)
        return Stack(w_down, w_up, b_down, b_up, scale, activation, gamma, beta, norm)
    tensors: list[Tensors] = [a(h) for a, _ in group]
    factors = [a.scale * weight for a, weight in group]
    # of several, and compiled, the weights go into w_up: an op takes one number, and as a constant
    b_down = b_up = gamma = beta = None
    if any(t.b_down is not None for t in tensors):
        b_down = _cat([t.biases()[0] for t in tensors])
        pairs = zip(tensors, factors, strict=True)
        shifts = [t.b_up * factor for t, factor in pairs if t.b_up is not None]
        b_up = functools.reduce(torch.add, shifts) if shifts else None
    if h is not None:
        gamma, beta = _modulation(tensors, h)
    w_down = _cat([t.w_down for t in tensors])
    w_up = _cat([t.w_up * factor for t, factor in zip(tensors, factors, strict=True)], dim=1)
    return Stack(w_down, w_up, b_down, b_up, 1.0, activation, gamma, beta, norm)


def _modulation(tensors: list[Tensors], h: Tensor) -> tuple[Tensor | None, Tensor | None]:
    ranks = [t.w_down.shape[0] for t in tensors]
    return (
        _cat_samples([t.gamma for t in tensors], ranks, h),
        _cat_samples([t.beta for t in tensors], ranks, h),
    )


def _cat_samples(parts: list[Tensor | None], ranks: list[int], h: Tensor) -> Tensor | None:
    """gamma or beta of all ranks (B, sum of R), zero where an adapter has none."""
    if all(part is None for part in parts):
        return None
    blank = h.new_zeros(h.shape[0], 1, dtype=torch.float32)
    pairs = zip(parts, ranks, strict=True)
    return _cat([blank.expand(-1, rank) if x is None else x for x, rank in pairs], dim=1)


def for_samples(stack: Stack, active: list[Weighted], h: Tensor) -> Stack:
    """A stack that `freeze` kept, with what depends on the timestep."""
    if not any(adapter.timed for adapter, _ in active):
        return stack
    gamma, beta = _modulation([adapter(h) for adapter, _ in active], h)
    return stack._replace(gamma=gamma, beta=beta)


def _cat(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def delta(h: Tensor, stack: Stack) -> Tensor:
    """scale * ((act(h @ w_down.T + b_down) * (1 + gamma) + beta) @ w_up.T + b_up), without h."""
    dtype = h.dtype
    h = nn.functional.layer_norm(h, h.shape[-1:]) if stack.norm else h
    b_down, b_up = (None if b is None else b.to(dtype) for b in (stack.b_down, stack.b_up))
    a = nn.functional.linear(h, stack.w_down.to(dtype), b_down)
    z = activate(a, stack.activation)
    gamma, beta = (
        None if x is None else x.to(dtype).reshape(h.shape[0], *[1] * (h.dim() - 2), -1)
        for x in (stack.gamma, stack.beta)
    )
    if gamma is not None:
        z = z * (1 + gamma)
    if beta is not None:
        z = z + beta
    return stack.scale * nn.functional.linear(z, stack.w_up.to(dtype), b_up)
