"""A piece of autograd graph that does not keep its inputs.

`remember(core, parts)` runs `core` on tensors that can be computed again, and keeps of what its
graph saves only what is not one of them. `Memory.backward` is given the parts anew:

    outs, memory, kept = remember(attend, (q, k, v))    # kept: attention's output, log-sum-exp
    dq, dk, dv = memory.backward((q, k, v), kept, (dh,))

It serves every attention engine and every op, as it asks nothing of them: PyTorch's
saved-tensor hooks tell what is saved. The memory itself holds no tensor, so whoever calls can
keep `kept` where autograd sees it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from ..ops.rule import record

Core = Callable[..., tuple[Tensor, ...]]


class _View(NamedTuple):
    """A saved tensor that lies in the memory of a part."""

    part: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # from the part's first element


class _Enter(torch.autograd.Function):
    """Puts tensors into a graph without a leaf, which would keep them."""

    operator = "lean"

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.detach() for part in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        raise AssertionError("gradients are taken at this node's outputs")


class Memory:
    """The graph of one run of a core."""

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self._parts: tuple[Tensor, ...] | None = parts
        self._kept: Sequence[Tensor] = []
        self._layout = [(p.dtype, p.shape, p.stride()) for p in parts]
        self._inputs: list[GradientEdge] = []
        self._outputs: list[GradientEdge | None] = []

    def backward(
        self, parts: Sequence[Tensor], kept: Sequence[Tensor], douts: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of the parts for those of the outputs."""
        found = [(p.dtype, p.shape, p.stride()) for p in parts]
        if found != self._layout:
            raise RuntimeError(
                f"lean: expected the same tensors as in the forward, {self._layout}, got {found}; "
                f"the model changed between the two"
            )
        pairs = [
            (edge, grad)
            for edge, grad in zip(self._outputs, douts, strict=True)
            if edge is not None and grad is not None
        ]
        if not pairs:
            return (None,) * len(parts)
        self._parts, self._kept = tuple(parts), kept
        try:
            # the graph holds no tensors: keeping it costs nothing, and serves a second backward
            return torch.autograd.grad(
                [edge for edge, _ in pairs], self._inputs, [grad for _, grad in pairs],
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
        finally:
            self._parts, self._kept = None, []

    def _pack(self, x: Tensor) -> _View | int:
        assert self._parts is not None
        memory = x.untyped_storage()._cdata
        for index, part in enumerate(self._parts):
            if part.untyped_storage()._cdata == memory and part.dtype == x.dtype:
                offset = int(x.storage_offset()) - int(part.storage_offset())
                return _View(index, x.dtype, x.shape, x.stride(), offset)
        assert isinstance(self._kept, list)
        self._kept.append(x.detach())
        return len(self._kept) - 1

    def _unpack(self, packed: _View | int) -> Tensor:
        if isinstance(packed, int):
            return self._kept[packed]
        assert self._parts is not None
        part = self._parts[packed.part]
        offset = part.storage_offset() + packed.offset
        return part.detach().as_strided(packed.size, packed.stride, offset)


def remember(
    core: Core, parts: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Memory, list[Tensor]]:
    """(core(*parts) without a graph, the graph, what it needs beside the parts)."""
    memory = Memory(parts)
    # the graph, which the memory holds, holds the hooks: through C++, where no collector looks
    its = weakref.proxy(memory)
    with torch.enable_grad():
        entered = record(_Enter, _anchor(), *parts)
        with saved_tensors_hooks(lambda x: its._pack(x), lambda packed: its._unpack(packed)):
            outs = core(*entered)
    memory._inputs = [get_gradient_edge(x) for x in entered]
    memory._outputs = [get_gradient_edge(y) if y.requires_grad else None for y in outs]
    kept = list(memory._kept)
    memory._parts, memory._kept = None, []
    return tuple(y.detach() for y in outs), memory, kept


def _anchor() -> Tensor:
    return torch.empty(0, requires_grad=True)
