"""From a table of cases to pytest-benchmark: checks, then interleaved samples, then the report.

All variants of a group (one op, workload, dtype and direction) are checked against the float64
oracle, then timed together in one interleaved loop, before the first of their tests reports. The
tests hand the samples to pytest-benchmark through its timer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from a3fta_kernels import ops
from a3fta_kernels.backends import why_not
from a3fta_kernels.ops.adapter.reference import adapter as eager_adapter
from a3fta_kernels.ops.adapter_linear.contract import paths_for
from a3fta_kernels.ops.adapter_linear.reference import adapter_linear as eager_adapter_linear
from tests.oracle import WEIGHT_GRADS, Case, Outcome, compare, evaluate, gradient, upcast

from . import measure
from .workloads import DIRECTIONS, Workload, workloads

EAGER = {"adapter": eager_adapter, "adapter_linear": eager_adapter_linear}
# yardsticks compute something else, so they are timed but not checked
YARDSTICKS = ("clone", "linear")
Op = Callable[..., Any]


@dataclass(frozen=True)
class Group:
    op: str
    workload: Workload
    dtype: torch.dtype
    direction: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.workload.name(self.op)}-{dtype}-{self.direction}"


@dataclass(frozen=True)
class Entry:
    """One test: a variant of a group."""

    group: Group
    variant: str

    def __str__(self) -> str:
        return f"{self.group}-{self.variant}"


@dataclass
class Settings:
    device: torch.device
    quick: bool
    minutes: float
    seconds: float  # of sampling for each group
    start: float = field(default_factory=time.perf_counter)
    ceilings: dict[str, float] | None = None


def entries(op: str, settings: Settings) -> list[Entry]:
    found = []
    for workload, dtype in workloads(op, settings.device.type, settings.quick):
        for direction in DIRECTIONS:
            group = Group(op, workload, dtype, direction)
            names = variants(group, settings.device)
            if settings.device.type == "cpu" and workload.r != 64:
                # inductor takes longer to build than all else takes to run
                del names["compile"]
            found += [Entry(group, name) for name in names]
    return found


def variants(group: Group, device: torch.device) -> dict[str, Op]:
    """Eager, torch.compile of it, every backend and path that runs here, and the yardsticks."""
    eager = EAGER[group.op]
    found: dict[str, Op] = {"eager": eager, "compile": eager}
    for backend in ("native", "triton"):
        if why_not(backend, device, group.dtype) is not None:
            continue
        if group.op == "adapter":
            found[backend] = _bind(ops.adapter, backend=backend)
        else:
            for path in paths_for(backend, device.type, group.workload.r):
                found[f"{backend}-{path}"] = _bind(ops.adapter_linear, backend=backend, path=path)
    if group.op == "adapter_linear":
        found["linear"] = _linear
    if group.direction == "forward":
        found["clone"] = _clone
    return found


def _bind(op: Op, **options: str) -> Op:
    return lambda **inputs: op(**inputs, **options)


def _linear(h: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, **_: Any):
    """The frozen projection without any adapter."""
    y = F.linear(h, weight, bias)
    return y if residual is None else y + residual


def _clone(h: Tensor, **_: Any) -> Tensor:
    return h.clone()


def case_of(group: Group) -> Case:
    """A bf16 or fp16 trunk carries fp32 adapters, as inject makes them."""
    w = group.workload
    linear = group.op == "adapter_linear"
    return Case(
        lead=(w.batch, w.tokens),
        c=w.c,
        r=w.r,
        n=w.n if linear else None,
        columns=(0, w.k) if linear and w.k else None,
        residual=linear and w.residual,
        adapter_dtype=torch.float32,
    )


class Runner:
    """Measures a group once and keeps it until the next one is asked for."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.group: Group | None = None
        self.found: dict[str, dict[str, Any]] = {}

    def result(self, entry: Entry) -> dict[str, Any]:
        if entry.group != self.group:
            self.group, self.found = entry.group, {}
            elapsed = (time.perf_counter() - self.settings.start) / 60
            if elapsed > self.settings.minutes:
                reason = f"not measured: the {self.settings.minutes:g} minutes were over"
                self.found = {"": {"skip": reason}}
            else:
                self.found = measure_group(entry.group, self.settings)
        result = self.found.get("") or self.found[entry.variant]
        if "skip" in result:
            pytest.skip(result["skip"])
        if "error" in result:
            pytest.fail(result["error"])
        return result


def measure_group(group: Group, settings: Settings) -> dict[str, dict[str, Any]]:
    device = settings.device
    torch.compiler.reset()
    case = case_of(group)
    sets, grads = _buffers(case, group, device)
    wanted = {e.variant for e in entries(group.op, settings) if e.group == group}
    functions = {k: v for k, v in variants(group, device).items() if k in wanted}
    if "compile" in functions:
        functions["compile"] = torch.compile(functions["compile"], fullgraph=True, dynamic=False)

    found: dict[str, dict[str, Any]] = {}
    clocks: dict[str, measure.Clock] = {}
    truth = _truth(group, sets[0], grads[0])
    for name, function in functions.items():
        try:
            if name not in YARDSTICKS:
                _assert_correct(group, function, sets[0], grads[0], truth)
            call = _call(group, function, sets, grads)
            found[name] = _counted(group, name, function, call, sets, device)
            clocks[name] = measure.clock_of(call, len(sets), device)
        except Exception as error:  # one variant that fails must not hide the others
            found[name] = {"error": f"{group}-{name}: {type(error).__name__}: {error}"}
    for name, times in measure.interleave(clocks, settings.seconds).items():
        found[name]["samples"] = times
    return found


def _counted(
    group: Group,
    name: str,
    function: Op,
    call: measure.Call,
    sets: list[dict[str, Any]],
    device: torch.device,
) -> dict[str, Any]:
    """What is known without the clock, and on a GPU the time that Python sees."""
    call(0)
    result: dict[str, Any] = {"peak_bytes": measure.peak_bytes(call, device)}
    # the loops that inductor generates for the CPU are no operators: nothing to count
    if not (name == "compile" and device.type == "cpu"):
        result["counts"] = measure.count(call, device)
    if device.type == "cuda":
        result["host_us"] = 1e6 * measure.host_seconds(call, len(sets), device)
    if group.direction == "forward+backward":
        constant = [v for k, v in sets[0].items() if isinstance(v, Tensor) and k != "h"]
        result["saved_bytes"] = measure.saved_bytes(lambda: function(**sets[0]), constant)
    return result


def _buffers(
    case: Case, group: Group, device: torch.device
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Equal inputs at different places, enough of them that no call finds its own in the cache."""
    linear = group.op == "adapter_linear"
    shape = torch.Size((*case.lead, case.n if linear else case.c))
    first = case.inputs(group.dtype, str(device))
    dy = gradient(shape, group.dtype, str(device), "plain", 0)
    touched = sum(first[k].nbytes for k in ("h", "residual") if k in first) + 2 * dy.nbytes
    count = measure.rotations(touched, device)
    sets = [first, *(_fresh(first) for _ in range(count - 1))]
    return sets, [dy, *(dy.clone() for _ in range(count - 1))]


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    moved = {"h", "residual"}
    return {
        k: v.detach().clone().requires_grad_() if k in moved and v is not None else v
        for k, v in inputs.items()
    }


def _truth(group: Group, inputs: dict[str, Any], dy: Tensor) -> tuple[Outcome, Outcome]:
    """The float64 oracle and eager, both with gradients."""
    eager = EAGER[group.op]
    return evaluate(eager, upcast(inputs), dy.double()), evaluate(eager, inputs, dy)


def _assert_correct(
    group: Group, op: Op, inputs: dict[str, Any], dy: Tensor, truth: tuple[Outcome, Outcome]
) -> None:
    exact, eager = truth
    if group.direction == "forward":
        with torch.no_grad():
            y = op(**inputs)
        compare("y", y, eager.y, exact.y, group.dtype, 2.0)
        return
    ours = evaluate(op, inputs, dy)
    compare("y", ours.y, eager.y, exact.y, group.dtype, 2.0)
    for name, grad in ours.grads.items():
        factor = 3.0 if name in WEIGHT_GRADS else 2.0
        compare(f"d{name}", grad, eager.grads[name], exact.grads[name], group.dtype, factor)


def _call(group: Group, op: Op, sets: list[dict[str, Any]], grads: list[Tensor]) -> measure.Call:
    if group.direction == "forward":

        def forward(i: int) -> Any:
            with torch.no_grad():
                return op(**sets[i])

        return forward

    leaves = [[v for v in s.values() if isinstance(v, Tensor) and v.requires_grad] for s in sets]

    def both(i: int) -> Any:
        y = op(**sets[i])
        return torch.autograd.grad(y, leaves[i], grads[i], allow_unused=op is _linear)

    return both


class Clock:
    """A timer for pytest-benchmark that runs through samples taken beforehand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.samples: list[float] = []

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += self.samples.pop()


clock = Clock()


def report(entry: Entry, benchmark: Any, runner: Runner) -> None:
    """One test: hands the samples to pytest-benchmark and the rest to its extra_info."""
    result = runner.result(entry)
    group, workload = entry.group, entry.group.workload
    settings = runner.settings
    if settings.ceilings is None:
        settings.ceilings = measure.ceilings(settings.device)
    dtype = str(group.dtype).removeprefix("torch.")
    flop, moved = (
        workload.flop(group.op, group.direction),
        workload.bytes(group.op, group.direction, group.dtype),
    )
    floor = max(
        flop / settings.ceilings[f"{dtype}_flop_per_s"],
        moved / settings.ceilings["copy_bytes_per_s"],
    )
    work = {"floor_us": 1e6 * floor, "flop": flop, "bytes": moved}
    samples = sorted(result["samples"])
    benchmark.group = str(group)
    benchmark.extra_info |= {
        "row": {
            "op": group.op,
            "workload": workload.name(group.op),
            "model": workload.model,
            "dtype": dtype,
            "direction": group.direction,
            "variant": entry.variant,
            "rounds": len(samples),
            **{f"q{q}_us": 1e6 * samples[int(q / 100 * (len(samples) - 1))] for q in (20, 50, 80)},
            **({} if entry.variant in YARDSTICKS else work),
            **{k: v for k, v in result.items() if k != "samples"},
        },
        "ceilings": settings.ceilings,
    }
    clock.samples = list(samples)
    benchmark.pedantic(clock.tick, rounds=len(samples))
