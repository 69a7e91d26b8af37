"""Measures a batch of cells: checks, counters, then rounds in which every cell takes one step.

All cells of a batch are in memory at once and compute with the same frozen tensors (a full
fine-tuning has its own copy). Each round runs one step of every cell, in an order that rotates.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from a3fta_kernels.backends import BackendUnavailableError

from . import measure
from .step_methods import (
    ANCHOR,
    COMPILE,
    EIGHT_BITS,
    GRAPH,
    Batch,
    Captured,
    Cell,
    Step,
    build,
    strict_compiler,
)  # fmt: skip
from .step_models import Model
from .variants import CannotRun

# least cosine of all gradients with those of the stock trunk, as one vector, and what the loss may
# differ by
LEAST = {torch.float32: (0.9999, 1e-4), torch.bfloat16: (0.99, 3e-2)}
LEAST_8_BITS = 0.99


class Wrong(Exception):
    """A cell that computes something else than the others of its method."""


@dataclass
class Limits:
    """seconds: of rounds for each batch; at least `rounds`. end: no batch, cell or further round
    begins after this time of `time.perf_counter`."""

    seconds: float
    rounds: int
    end: float
    most: int = 50

    @property
    def over(self) -> bool:
        return time.perf_counter() > self.end


@dataclass
class Found:
    """rows: what was measured. absent: why the other cells were not, by cell."""

    rows: dict[Cell, dict[str, Any]] = field(default_factory=dict)
    absent: dict[Cell, str] = field(default_factory=dict)


def measure_batch(
    model: Model, trunk: nn.Module, batch: Batch, device: torch.device, limits: Limits
) -> Found:
    dtype = next(trunk.parameters()).dtype
    inputs = model.inputs(device, dtype)
    found = Found()
    steps: dict[Cell, Step] = {}
    truths: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
    with strict_compiler():
        for cell in batch.cells:
            if limits.over:
                found.absent[cell] = "the minutes were over"
                continue
            try:
                step = build(cell, trunk, inputs)
                check(cell, step, truths, dtype)
                found.rows[cell] = count(cell, step, trunk, device)
                steps[cell] = step
                print(f"  {cell}: right, and counted", flush=True)
            except Exception as error:  # one that fails must not hide the others
                found.absent[cell] = reason(error)
            release(device)
        truths.clear()
        clocks = {cell: clock(step, device) for cell, step in steps.items()}
        samples, failed = rounds(clocks, limits)
        for cell in samples:
            if limits.over:  # what was timed has to be written yet
                break
            try:
                found.rows[cell] |= started(cell, steps[cell], device)
            except Exception as error:  # its times stand
                print(f"  {cell}: what it starts is not counted: {reason(error)}", flush=True)
        steps.clear()
    for cell, why in failed.items():
        found.absent[cell] = why
        del found.rows[cell]
    medians = {str(cell): quantile([s[0] for s in taken], 50) for cell, taken in samples.items()}
    for cell, taken in samples.items():
        found.rows[cell] |= timed(taken, device) | {"batch": batch.name, "beside": medians}
    release(device)
    return found


def reason(error: Exception) -> str:
    if isinstance(error, (CannotRun, BackendUnavailableError)):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first}"[:300]


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        # after a capture that broke off the allocator may refuse; what was measured still counts
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def check(
    cell: Cell, step: Step, truths: dict[str, tuple[Tensor, dict[str, Tensor]]], dtype: torch.dtype
) -> None:
    """Holds loss and gradients to those of the first cell of its method, on the stock trunk."""
    loss, grads = step.gradients()
    if not bool(loss.isfinite()):
        raise Wrong(f"its loss is {float(loss)}")
    if cell.same not in truths:
        truths[cell.same] = loss, grads
        return
    wanted, truth = truths[cell.same]
    least, far = LEAST[dtype]
    if cell.variant.removesuffix(f", {GRAPH}") in EIGHT_BITS:
        least = min(least, LEAST_8_BITS)
    off = abs(float(loss - wanted)) / abs(float(wanted))
    if off > far:
        raise Wrong(f"its loss is {float(loss):.6g}, with the stock trunk {float(wanted):.6g}")
    if grads.keys() != truth.keys():
        raise Wrong("other parameters train than with the stock trunk")
    found = cosine(grads, truth)
    if not found >= least:
        raise Wrong(f"cosine of its gradients {found:.5f}, at least {least:g} is right")


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    def dot(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        return sum(float((x[k].double() * y[k].double()).sum()) for k in x)

    return dot(a, b) / max((dot(a, a) * dot(b, b)) ** 0.5, 1e-300)


def count(cell: Cell, step: Step, trunk: nn.Module, device: torch.device) -> dict[str, Any]:
    """What needs no clock, but for how much is started."""
    row: dict[str, Any] = {
        "trainable_parameters": sum(p.numel() for p in step.trained.values()),
        "weights_bytes": sum(p.nbytes for p in (*trunk.parameters(), *trunk.buffers())),
    }
    # a hook around a compiled forward would have it compiled anew, without what it was asked for;
    # a graph saves what the step that it is of saves
    if COMPILE not in cell.variant and not isinstance(step, Captured):
        constant = [*step.model.parameters(), *step.model.buffers()]
        row["saved_bytes"] = measure.saved_bytes(step.loss, constant)
    row |= peak_on_gpu(step, device) if device.type == "cuda" else peak_on_cpu(cell, step)
    row["resident_bytes"] = step.resident_bytes
    return row


def started(cell: Cell, step: Step, device: torch.device) -> dict[str, Any]:
    """How much a step starts. After all rounds: once used, CUPTI makes every launch slower."""
    # the loops that inductor generates for the CPU are no operators: nothing to count
    if COMPILE in cell.variant and device.type == "cpu":
        return {}
    return {"counts": measure.count(step.run, device, warm=True)}


def peak_on_gpu(step: Step, device: torch.device) -> dict[str, Any]:
    """The most that a step holds at once above the trunk's weights: adapters, their gradients and
    the optimizer's states included."""
    step.run()  # makes those states
    if isinstance(step, Captured):  # a graph holds its memory for good
        return {"peak_bytes": None}
    taken = measure.peak_bytes(step.run, device)
    assert taken is not None
    return {"peak_bytes": taken + step.resident_bytes, "peak_by": "torch.cuda.max_memory_allocated"}


def peak_on_cpu(cell: Cell, step: Step) -> dict[str, Any]:
    """The same, by what operators are seen to hold in forward and backward: without workspaces,
    and of nothing compiled."""
    if step.optimizer is None or COMPILE in cell.variant:
        step.run()
        return {"peak_bytes": None}
    from a3fta_kernels.memory import peak

    inputs = {k: x for k, x in step.inputs.items() if k != "target"}
    seen = peak.measure(step.model, (), inputs | {"return_dict": False})
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    return {"peak_bytes": seen.bytes + step.resident_bytes, "peak_by": "live tensors"}


Sample = tuple[float, float]  # seconds of a step, and until all of it was started


def clock(step: Step, device: torch.device) -> Callable[[], Sample]:
    if device.type != "cuda":

        def on_cpu() -> Sample:
            start = time.perf_counter()
            step.run()
            spent = time.perf_counter() - start
            return spent, spent

        return on_cpu
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def on_gpu() -> Sample:
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        step.run()
        end.record()
        started = time.perf_counter() - start
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, started

    return on_gpu


def rounds(
    clocks: dict[Cell, Callable[[], Sample]], limits: Limits
) -> tuple[dict[Cell, list[Sample]], dict[Cell, str]]:
    """One step of every cell a round, from another one each time; every cell is warm.

    A cell that fails leaves, and is named with the reason.
    """
    order = list(clocks)
    samples: dict[Cell, list[Sample]] = {cell: [] for cell in order}
    failed: dict[Cell, str] = {}
    begun = time.perf_counter()
    for turn in range(limits.most):
        enough = turn >= limits.rounds and time.perf_counter() - begun > limits.seconds
        if enough or (turn >= 3 and limits.over):
            break
        first = turn % max(1, len(order))
        for cell in (*order[first:], *order[:first]):
            if cell in failed:
                continue
            try:
                taken = clocks[cell]()
            except Exception as error:
                failed[cell] = reason(error)
                del samples[cell]
                continue
            samples[cell].append(taken)
    return samples, failed


def timed(samples: list[Sample], device: torch.device) -> dict[str, Any]:
    seconds = [s for s, _ in samples]
    found: dict[str, Any] = {"rounds": len(seconds)}
    found |= {f"q{q}_us": quantile(seconds, q) for q in (20, 50, 80)}
    if device.type == "cuda":
        found["host_us"] = quantile([h for _, h in samples], 50)
    return found


def quantile(seconds: list[float], q: int) -> float:
    ranked = sorted(seconds)
    return 1e6 * ranked[int(q / 100 * (len(ranked) - 1) + 0.5)]


def needed(batch: Batch, wanted: Callable[[Cell], bool]) -> Batch | None:
    """The cells that are asked for, and the one that they are compared to."""
    cells = tuple(cell for cell in batch.cells if wanted(cell))
    if not cells:
        return None
    return batch._replace(cells=cells if ANCHOR in cells else (ANCHOR, *cells))
