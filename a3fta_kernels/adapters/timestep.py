"""The timestep that time-aware adapters read: of the denoiser's forward that is running now.

The forward's hooks (`a3fta_kernels.timesteps`) set it and end it again, per thread. Whatever
computes a part of a forward a second time (gradient checkpointing, the lean levels) takes `now()`
along in the first and goes back to it by `at`: several forwards may precede a backward.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

WIDTH = 64  # of the embedding
_LONGEST = 10_000  # longest wavelength over 2 pi, as in the denoisers' own embeddings


class Moment(NamedTuple):
    """t (n,) on a scale of 0 to 1000, and its embedding (n, WIDTH); n is 1, or one per sample."""

    t: Tensor
    embedding: Tensor


class _Forward(NamedTuple):
    moment: Moment | None
    whose: Any = None  # which model's
    outer: _Forward | None = None  # the one around it


class _Cell:
    forward: _Forward | None = None


class _Thread(threading.local):
    # in a cell, because the compiler loses what is written to a threading.local itself
    def __init__(self) -> None:
        self.cell = _Cell()


_thread = _Thread()


def now() -> Moment | None:
    """The timestep of the forward that this thread runs; None outside of one."""
    forward = _thread.cell.forward
    return None if forward is None else forward.moment


def begin(moment: Moment | None, whose: Any = None) -> None:
    """A forward begins with this timestep, None where it has none."""
    outer = _thread.cell.forward
    # an earlier one of the same model is no forward around this: it was cut off
    while outer is not None and outer.whose is whose:
        outer = outer.outer
    _thread.cell.forward = _Forward(moment, whose, outer)


def end() -> None:
    """The forward ends that began last."""
    forward = _thread.cell.forward
    _thread.cell.forward = None if forward is None else forward.outer


@contextlib.contextmanager
def at(moment: Moment | None) -> Iterator[None]:
    """Inside, the timestep is this one: for what a backward computes again."""
    before = _thread.cell.forward
    _thread.cell.forward = _Forward(moment)
    try:
        yield
    finally:
        _thread.cell.forward = before


def moment_of(t: Tensor) -> Moment:
    """A timestep (), one per sample (B,), or of each one's frames or tokens (B, ...), with its
    sines and cosines. Of a sample's the noisiest counts: the others are what it is given, such as
    the first frame.
    """
    t = t.reshape(1) if t.dim() == 0 else t.flatten(1).amax(1) if t.dim() > 1 else t
    half = WIDTH // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t[..., None] * torch.exp(-math.log(_LONGEST) * steps)
    return Moment(t, torch.cat((angles.cos(), angles.sin()), dim=-1))


def for_samples(x: Tensor, samples: int) -> Tensor:
    """x (n, ...) of n timesteps as (samples, ...): one for all, one each, or one for several
    neighbours, where a model folds frames or places into the batch."""
    if x.shape[0] == samples:
        return x
    if x.shape[0] == 1:
        return x.expand(samples, *x.shape[1:])
    if samples % x.shape[0]:
        raise ValueError(
            f"timestep: expected one, or a number that divides attention's batch of {samples}, "
            f"got {x.shape[0]}"
        )
    return x.repeat_interleave(samples // x.shape[0], dim=0)


def required() -> Moment:
    """`now()`, or an error that says where the timestep should have come from."""
    moment = now()
    if moment is None:
        raise RuntimeError(
            "timestep: expected a forward of the whole denoiser, called with its timestep, as the "
            "adapters on this layer depend on it; got none. Call the model that inject was given; "
            "for gradient checkpointing use its enable_gradient_checkpointing(), or checkpoint "
            "the whole model"
        )
    return moment
