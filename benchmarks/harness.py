"""From a table of cases to pytest-benchmark: checks, then interleaved samples, then the report.

All variants of a group (one op, workload, dtype and direction) are checked against the float64
oracle, then timed together in one interleaved loop, before the first of their tests reports. The
tests hand the samples to pytest-benchmark through its timer.
"""

from __future__ import annotations

import gc
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor

from a3fta_kernels.backends import BackendUnavailableError
from tests.oracle import WEIGHT_GRADS, Outcome, compare, gradient, jitter, upcast

from . import floors, measure, variants
from .variants import COPIES, MOVED, UNLIKE, CannotRun, Subject, Variant
from .workloads import Workload, directions, workloads


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
    rank: int | None = None
    without: str = ""  # a pattern of variants to leave out
    rows: Path | None = None  # a file that each row is added to as soon as it is there
    start: float = field(default_factory=time.perf_counter)
    ceilings: dict[str, float] | None = None


def entries(op: str, settings: Settings) -> list[Entry]:
    device = settings.device.type
    found = []
    for workload, dtype in workloads(op, device, settings.quick, settings.rank):
        for direction in directions(op, workload, device):
            group = Group(op, workload, dtype, direction)
            for name in variants.names(op, workload, dtype, direction, device):
                if not (settings.without and re.search(settings.without, name)):
                    found.append(Entry(group, name))
    return found


class Runner:
    """Measures a group once and keeps it until the next one is asked for.

    What the directions of a workload share (inputs, the truth, compiled functions) is kept as long
    as the workload stays the same.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.group: Group | None = None
        self.prepared: Prepared | None = None
        self.found: dict[str, dict[str, Any]] = {}

    def result(self, entry: Entry) -> dict[str, Any]:
        if entry.group != self.group:
            self.group, self.found = entry.group, self._measure(entry.group)
        result = self.found.get("") or self.found[entry.variant]
        if "skip" in result:
            pytest.skip(result["skip"])
        if "error" in result:
            pytest.fail(result["error"])
        return result

    def _measure(self, group: Group) -> dict[str, dict[str, Any]]:
        settings = self.settings
        elapsed = (time.perf_counter() - settings.start) / 60
        if elapsed > settings.minutes:
            return {"": {"skip": f"not measured: the {settings.minutes:g} minutes were over"}}
        try:
            if self.prepared is None or not self.prepared.serves(group):
                self.prepared = None  # its memory first
                self.prepared = Prepared(group, settings)
            return self.prepared.measure(group.direction)
        except Exception as error:  # of the whole group: out of memory, a lost device
            return {"": {"error": f"{group}: {type(error).__name__}: {error}"}}


class Prepared:
    """One workload: equal inputs at different places, the truth, and the variants that are right.

    On a GPU everything runs on one stream of its own, which the graphs are captured from: the
    backward of an activation runs on the stream of its forward.
    """

    def __init__(self, group: Group, settings: Settings) -> None:
        self.group, self.settings = group, settings
        torch.compiler.reset()
        gc.collect()
        self.stream = measure.new_stream(settings.device)
        with measure.on_stream(self.stream):
            self.subject = Subject.make(group.op, group.workload, group.dtype, settings.device)
            self.sets, self.grads = self._buffers()
            self.truth = self._truth()
        # a variant, or why there is none
        self.built: dict[str, Variant | dict[str, str]] = {}

    def serves(self, group: Group) -> bool:
        return (group.op, group.workload, group.dtype) == (
            self.group.op, self.group.workload, self.group.dtype
        )  # fmt: skip

    def measure(self, direction: str) -> dict[str, dict[str, Any]]:
        group = Group(self.group.op, self.group.workload, self.group.dtype, direction)
        wanted = [e.variant for e in entries(group.op, self.settings) if e.group == group]
        found: dict[str, dict[str, Any]] = {}
        clocks: dict[str, measure.Clock] = {}
        # activations that are kept for several backwards may not be donated to the first
        with (
            measure.on_stream(self.stream),
            torch._functorch.config.patch(donated_buffer=False),
        ):
            for name in wanted:
                variant = self._variant(name, direction)
                if isinstance(variant, dict):
                    found[name] = dict(variant)
                    continue
                try:
                    call = call_of(direction, variant, self.sets, self.grads)
                    found[name] = self._counted(name, variant, call, direction)
                    clocks[name] = measure.clock_of(call, len(self.sets), self.settings.device)
                except Exception as error:  # one variant that fails must not hide the others
                    found[name] = {"error": f"{group}-{name}: {type(error).__name__}: {error}"}
            for name, times in measure.interleave(clocks, self.settings.seconds).items():
                found[name]["samples"] = times
        return found

    def _variant(self, name: str, direction: str) -> Variant | dict[str, str]:
        key = f"{name} {direction}" if name in COPIES else name
        if key not in self.built:
            try:
                variant = variants.build(name, self.subject, direction)
                if variant.checked:
                    self._assert_correct(variant)
                self.built[key] = variant
            except (CannotRun, BackendUnavailableError) as reason:
                self.built[key] = {"skip": f"{name}: {reason}"}
            except Exception as error:
                text = f"{self.group}-{name}: {type(error).__name__}: {error}"
                self.built[key] = {"error": text}
        return self.built[key]

    def _counted(
        self, name: str, variant: Variant, call: measure.Call, direction: str
    ) -> dict[str, Any]:
        """What is known without the clock, and on a GPU the time that Python sees and takes."""
        device, sets = self.settings.device, self.sets
        call(0)
        result: dict[str, Any] = {"peak_bytes": measure.peak_bytes(call, device)}
        # the loops that inductor generates for the CPU are no operators: nothing to count
        if not (name == "compile" and device.type == "cpu"):
            result["counts"] = measure.count(call, device)
        if device.type == "cuda":
            result["host_us"] = 1e6 * measure.host_seconds(call, len(sets), device)
            result["enqueue_us"] = 1e6 * measure.enqueue_seconds(call, len(sets))
        if direction == "forward+backward" and not variant.copied:
            constant = [
                *(x for k, x in sets[0].items() if isinstance(x, Tensor) and k not in MOVED),
                *(variant.module.parameters() if variant.module is not None else ()),
            ]
            result["saved_bytes"] = measure.saved_bytes(lambda: variant.run(**sets[0]), constant)
        return result

    def _buffers(self) -> tuple[list[dict[str, Any]], list[Tensor]]:
        """Enough sets that no call finds its own in the cache."""
        subject = self.subject
        first, device = subject.inputs, self.settings.device
        dy = gradient(subject.y_shape, subject.dtype, str(device), "plain", 0)
        dy = subject.laid_out(dy)
        # a forward touches the least: its inputs, and a result as large as dy
        touched = sum(first[k].nbytes for k in MOVED if first.get(k) is not None) + dy.nbytes
        count = measure.rotations(touched, device)
        sets = [first, *(_fresh(first) for _ in range(count - 1))]
        return sets, [dy, *(dy.clone() for _ in range(count - 1))]

    def _truth(self) -> tuple[Outcome, list[Outcome]]:
        """The float64 oracle; and what sets the bar: eager, and the oracle of moved inputs."""
        exact, eager = self.subject.exact(), variants.build("eager", self.subject, "")
        wide, dy, dtype = upcast(self.sets[0]), self.grads[0], self.group.dtype
        bars = [evaluate(eager, self.sets[0], dy)]
        for seed in range(2):
            moved = jitter(wide, dtype, seed), jitter(dy.double(), dtype, seed)
            bars.append(evaluate(exact, *moved))
        return evaluate(exact, wide, dy.double()), bars

    def _assert_correct(self, variant: Variant) -> None:
        exact, bars = self.truth
        dtype = self.group.dtype
        with torch.no_grad():
            y = variant.run(**self.sets[0])
        compare("y without gradients", y, [b.y for b in bars], exact.y, dtype, 2.0)
        ours = evaluate(variant, self.sets[0], self.grads[0])
        compare("y", ours.y, [b.y for b in bars], exact.y, dtype, 2.0)
        assert ours.grads.keys() == exact.grads.keys()
        for name, grad in ours.grads.items():
            factor = 3.0 if name.rpartition(".")[2] in WEIGHT_GRADS else 2.0
            others = [b.grads[name] for b in bars]
            compare(f"d{name}", grad, others, exact.grads[name], dtype, factor)


def _fresh(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.detach().clone().requires_grad_(v.requires_grad) if k in MOVED and v is not None else v
        for k, v in inputs.items()
    }


def evaluate(variant: Variant, inputs: dict[str, Any], dy: Tensor) -> Outcome:
    leaves = variant.leaves(inputs)
    y = variant.run(**inputs)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)) if leaves else ()
    return Outcome(y.detach(), dict(zip(leaves, found, strict=True)))


def call_of(
    direction: str, variant: Variant, sets: list[dict[str, Any]], grads: list[Tensor]
) -> measure.Call:
    """Runs the variant on set i. The backward alone starts from activations that are kept."""
    if variant.copied:
        size = variant.copied // 2
        sources = [torch.empty(size, dtype=torch.uint8, device=g.device).random_() for g in grads]
        return lambda i: sources[i].clone()
    if direction == "forward":

        def forward(i: int) -> Any:
            with torch.no_grad():
                return variant.run(**sets[i])

        return forward

    leaves = [list(variant.leaves(s).values()) for s in sets]
    if direction == "backward":
        results = [variant.run(**s) for s in sets]
        return lambda i: torch.autograd.grad(results[i], leaves[i], grads[i], retain_graph=True)

    def both(i: int) -> Any:
        return torch.autograd.grad(variant.run(**sets[i]), leaves[i], grads[i])

    return both


def _work(group: Group, result: dict[str, Any], ceilings: dict[str, float]) -> dict[str, Any]:
    """The floor, and the terms that may bound the variant: its launches besides the floor's own."""
    at = (group.op, group.workload)
    terms = floors.terms(*at, group.dtype, group.direction, ceilings)
    floor = max(terms.values())
    for launches in result.get("counts", {}).values():
        terms["launches"] = 1e6 * launches * ceilings["launch_s"]
    return {
        "floor_us": floor,
        "flop": floors.flop(*at, group.direction),
        "bytes": floors.moved(*at, group.direction, group.dtype),
        "terms_us": terms,
    }


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
    """One test: hands the samples to pytest-benchmark and the row to the file of rows."""
    result = runner.result(entry)
    group, workload = entry.group, entry.group.workload
    settings = runner.settings
    if settings.ceilings is None:
        settings.ceilings = measure.ceilings(settings.device)
    samples = sorted(result["samples"])
    row = {
        "op": group.op,
        "workload": workload.name(group.op),
        "model": workload.model,
        "dtype": str(group.dtype).removeprefix("torch."),
        "direction": group.direction,
        "variant": entry.variant,
        "rounds": len(samples),
        **{f"q{q}_us": 1e6 * samples[int(q / 100 * (len(samples) - 1))] for q in (20, 50, 80)},
        **({} if entry.variant in UNLIKE else _work(group, result, settings.ceilings)),
        **{k: v for k, v in result.items() if k != "samples"},
    }
    if settings.rows is not None:
        with settings.rows.open("a") as file:
            file.write(json.dumps({"row": row, "ceilings": settings.ceilings}) + "\n")
    benchmark.group = str(group)
    clock.samples = list(samples)
    benchmark.pedantic(clock.tick, rounds=len(samples))
