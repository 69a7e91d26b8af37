"""Banks: a layer's adapters side by side, each sample of the batch with one of its own.

What `adapters_per_sample` puts on the adapted layers while its block runs. Adapters of different
ranks are padded with zeros; those of different activations and placements are banks of their own,
which one sample after the other passes through: in all but one of them it has no adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import ops
from .adapters import BottleneckAdapter, reruns
from .adapters.bottleneck import Tensors
from .ops.rule import acc_dtype


@dataclass
class Batch:
    """What the layers of a model know of its batch: how many samples its last forward had."""

    samples: int | None = None  # None: the layers run on their own


@dataclass(frozen=True, eq=False)
class Bank:
    """Adapters of one activation and placement, and which of them each named sample has."""

    adapters: tuple[BottleneckAdapter, ...]
    stacked: Tensors  # a copy, in the dtype of the layer
    scale: Tensor  # (K,)
    index: Tensor  # (B,) int32; -1: none of these
    activation: str
    placement: str
    batch: Batch

    @property
    def outputs(self) -> int:
        return self.stacked.w_up.shape[1]

    def __call__(self, h: Tensor, backend: str, base: Tensor | None = None) -> Tensor:
        """base (n, ..., N), or h (n, ..., C), + each sample's adapter of h; n as in `places`."""
        trains = (torch.is_grad_enabled() or reruns.is_first()) and any(
            p.requires_grad for adapter in self.adapters for p in adapter.parameters()
        )
        places = reruns.found(self, lambda: self.places(len(h)))
        # gradients go to the adapters themselves
        made = stacked(self.adapters) if trains else self.stacked
        return ops.adapter_bank(
            h, made.w_down, made.w_up, places, made.b_down, made.b_up,
            base=base, scale=self.scale, activation=self.activation, backend=backend,
        )  # fmt: skip

    def places(self, rows: int) -> Tensor:
        """The index of a layer's batch of `rows`.

        Guidance concatenates whole batches, one after the other; layers of video models have the
        frames (or places) of a sample side by side, one sample after the other.
        """
        named, samples = len(self.index), self.batch.samples
        if samples is None or rows < samples:
            samples = rows
        check_batch(samples, named)
        if rows % samples:
            raise ValueError(
                f"h: expected a batch that is a multiple of the model's, {samples}, got {rows}"
            )
        index = self.index
        if samples > named:
            index = index.repeat(samples // named)
        return index if rows == samples else index.repeat_interleave(rows // samples)

    def sized_freely(self) -> Bank:
        """Itself: for another number of adapters, or another rank, compiled code stays."""
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None:  # nothing is compiled; its import takes a second
            return self
        for tensor, dims in zip(self.stacked, ((0, 1), (0, 2), (0, 1), (0,)), strict=False):
            if tensor is not None:
                dynamo.maybe_mark_dynamic(tensor, dims)
        dynamo.maybe_mark_dynamic(self.scale, 0)
        return self

    def moved(self, fn: Callable[[Tensor], Tensor]) -> Bank:
        """With what a module's `to`, `cuda` or `half` does to its tensors."""
        index = fn(self.index)
        scale = self.scale.to(index.device)
        return replace(self, stacked=self.stacked.each(fn), scale=scale, index=index).sized_freely()


def check_batch(samples: int, named: int) -> None:
    if samples not in (named, 2 * named, 3 * named):
        raise ValueError(
            f"model: expected a batch of {named} samples, as many as have names, or two or three "
            f"times that (guidance), got {samples}; names are of images: with "
            f"num_images_per_prompt=n each is given n times in a row"
        )


def banks_of(
    adapters: list[BottleneckAdapter | None], dtype: torch.dtype | None, batch: Batch
) -> tuple[Bank, ...]:
    """The banks of a layer for samples with these adapters; dtype None: that of the adapters."""
    found = []
    for kind in dict.fromkeys(_kind(a) for a in adapters if a is not None):
        own = dict.fromkeys(a for a in adapters if a is not None and _kind(a) == kind)
        order = {adapter: k for k, adapter in enumerate(own)}
        # compiled code has a size of 1 for a constant
        members = (*order, *[next(iter(order))] * (len(order) == 1 < len(adapters)))
        index = [-1 if a is None else order.get(a, -1) for a in adapters]
        # a tensor made in inference mode could not serve a forward outside it
        with torch.inference_mode(False), torch.no_grad():
            made = stacked(members)
            if dtype is not None:
                made = made.each(lambda t: t.to(dtype))
            device = made.w_down.device
            wide = acc_dtype(made.w_down.dtype)
            scale = torch.tensor([a.scale for a in members], dtype=wide, device=device)
            places = torch.tensor(index, dtype=torch.int32, device=device)
        found.append(Bank(members, made, scale, places, *kind, batch).sized_freely())
    return tuple(found)


def _kind(adapter: BottleneckAdapter) -> tuple[str, str]:
    """What adapters of one bank have in common."""
    return adapter.activation, adapter.config.placement


def stacked(adapters: tuple[BottleneckAdapter, ...]) -> Tensors:
    """The adapters' tensors side by side, padded with zeros to the largest rank: w_down (K, R, C),
    w_up (K, C, R), b_down (K, R), b_up (K, C)."""
    own: list[Tensors] = [adapter() for adapter in adapters]
    rank = max(len(t.w_down) for t in own)
    w_down = torch.stack([F.pad(t.w_down, (0, 0, 0, rank - len(t.w_down))) for t in own])
    w_up = torch.stack([F.pad(t.w_up, (0, rank - t.w_up.shape[1])) for t in own])
    b_down = b_up = None
    if any(t.b_down is not None for t in own):
        downs, ups = zip(*(t.biases() for t in own), strict=True)
        b_down = torch.stack([F.pad(b, (0, rank - len(b))) for b in downs])
        b_up = torch.stack(ups)
    return Tensors(w_down, w_up, b_down, b_up)
