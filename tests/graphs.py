"""A stand-in for CUDA graphs, whose replays call again, and spoil what shares their memory."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import a3fta_kernels as a3fta
from a3fta_kernels import captured as module


class Generator:
    """A recording that broke off leaves one that is of no more use."""

    def clone_state(self):
        return "state"

    def graphsafe_set_state(self, state):
        assert state == "state"


class Graph:
    def pool(self):
        return "pool"


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lets `Captured` run on the CPU; the pools that recordings are given."""

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            assert isinstance(other, Stream)

    pools = []

    @contextlib.contextmanager
    def graph(recorded, pool, stream, capture_error_mode):
        pools.append(pool)
        yield

    for name, value in (
        ("Stream", Stream), ("current_stream", Stream), ("CUDAGraph", Graph), ("graph", graph),
        ("stream", lambda _: contextlib.nullcontext()),
        ("device", lambda _: contextlib.nullcontext()), ("set_stream", lambda _: None),
        ("get_rng_state", lambda _: torch.get_rng_state()),
        ("set_rng_state", lambda state, _: torch.set_rng_state(state)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(module, "_numbers_of", lambda device: Generator())
    monkeypatch.setattr(module, "_gpu_of", lambda parameters: parameters[0].device)
    record = a3fta.Captured._record

    made = []

    def recorded(self, given):
        found = record(self, given)
        made.append(found)

        def replay():
            for other in made:
                for grad in other.grads if other is not found else ():
                    if grad is not None:
                        grad.fill_(torch.nan)
            value, grads = self._gradients(found.inputs)
            found.loss.copy_(value)
            for mine, grad in zip(found.grads, grads, strict=True):
                if mine is not None:
                    mine.copy_(grad)

        found.graph.replay = replay
        return found

    monkeypatch.setattr(a3fta.Captured, "_record", recorded)
    return pools
