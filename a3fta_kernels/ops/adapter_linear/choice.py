"""Which path a call takes where none is named: measured choices first, else a rule.

`choices.json` holds, per class of device ("sm_90"), the fastest path of each shape that was
measured there, with its provenance; benchmarks/choose.py writes it from benchmark results. A
measurement speaks for shapes within a factor of two of its own in every dimension. Elsewhere the
cost model below decides. Nothing is timed at run time: the same shape takes the same path always.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...backends import device_class

TABLE = Path(__file__).with_name("choices.json")
REACH = 2.0  # the factor in M, N, K or R up to which a measurement speaks for a shape

MEASURED, RULE, ONLY = "measured", "rule", "the only one"


class Shape(NamedTuple):
    """M rows, N outputs, K inputs, rank R, and the dtype that the op computes in."""

    m: int
    n: int
    k: int
    rank: int
    dtype: torch.dtype


class Choice(NamedTuple):
    path: str
    source: str  # MEASURED, RULE or ONLY


class Span(NamedTuple):
    """From `rows` rows on, up to the next span, `choice` holds."""

    rows: int
    choice: Choice


class Machine(NamedTuple):
    """What the rule takes a device to do: data-sheet figures, dense products."""

    half_flops: float  # per second, 16-bit products on tensor cores
    single_flops: float  # fp32 products
    bandwidth: float  # bytes per second


MACHINES = {
    "sm_80": Machine(312e12, 19.5e12, 2.0e12),
    "sm_86": Machine(71e12, 35.6e12, 0.94e12),
    "sm_89": Machine(165e12, 82.6e12, 1.0e12),
    "sm_90": Machine(989e12, 67e12, 3.35e12),
    "sm_100": Machine(2250e12, 80e12, 8.0e12),
    "sm_120": Machine(209e12, 105e12, 1.8e12),
}
UNKNOWN = MACHINES["sm_80"]

# assumptions of the rule, to be replaced by measurements: what a launch costs, the share of the
# data sheet that the library's products reach, and the share of the library's rate that ours do
LAUNCH_SECONDS = 4e-6
LIBRARY_SHARE = 0.8
OWN_SHARE = {2: 0.75, 4: 0.5}  # by bytes per element
FUSED_TILE = 128  # columns for which the fused kernel makes z anew

# kernels for z, y and dh, by backend: forward, backward. What else runs is common to all paths
LAUNCHES = {
    "triton": {"skinny": (2, 2), "fused": (1, 1), "concat": (2, 1)},
    "native": {"skinny": (3, 2), "fused": (1, 1), "concat": (2, 1)},
}


def choose(backend: str, device: torch.device, paths: tuple[str, ...], shape: Shape) -> Choice:
    """One of `paths`, those that `backend` has on the device for this rank, for one shape."""
    return _choose(backend, device_class(device), paths, shape)


def spans(
    backend: str, device: torch.device, paths: tuple[str, ...], shape: Shape, last: int = 1 << 20
) -> list[Span]:
    """The choices for `shape` with 1 to `last` rows: from how many rows on each holds."""

    def at(rows: int) -> Choice:
        return choose(backend, device, paths, shape._replace(m=rows))

    found = [Span(1, at(1))]
    low = 1
    while low < last:
        high = min(2 * low, last)
        while (choice := at(high)) != found[-1].choice:
            # the first of low + 1 .. high that differs
            first, end = low + 1, high
            while first < end:
                middle = (first + end) // 2
                if at(middle) == found[-1].choice:
                    first = middle + 1
                else:
                    end = middle
            found.append(Span(first, at(first)))
            low = first
            if at(high) != choice:
                break
        low = high
    return found


@functools.lru_cache(maxsize=4096)
def _choose(backend: str, device: str, paths: tuple[str, ...], shape: Shape) -> Choice:
    if len(paths) == 1:
        return Choice(paths[0], ONLY)
    measured = nearest(table().get(device, {}).get("choices", []), backend, paths, shape)
    if measured is not None:
        return Choice(measured, MEASURED)
    machine = MACHINES.get(device, UNKNOWN)
    return Choice(min(paths, key=lambda p: seconds(p, backend, machine, shape)), RULE)


@functools.cache
def table() -> dict[str, Any]:
    """Device class -> provenance, and "choices": [backend, dtype, M, N, K, R, path] each."""
    return json.loads(TABLE.read_text())


def nearest(
    choices: list[list[Any]], backend: str, paths: tuple[str, ...], shape: Shape
) -> str | None:
    """The path measured for the shape nearest to this one, or None where none is in reach."""
    here = (shape.m, shape.n, shape.k, shape.rank)
    dtype = str(shape.dtype).removeprefix("torch.")
    best, found = math.inf, None
    for its_backend, its_dtype, *sizes, path in choices:
        if (its_backend, its_dtype) != (backend, dtype) or path not in paths:
            continue
        steps = [abs(math.log(max(a, 1) / b)) for a, b in zip(here, sizes, strict=True)]
        if max(steps) <= math.log(REACH) + 1e-9 and sum(steps) < best:
            best, found = sum(steps), path
    return found


def seconds(path: str, backend: str, machine: Machine, shape: Shape) -> float:
    """The rule's time for z, y and dh, forward and backward, by `path`.

    Each kernel takes what its products or its bytes take, whichever is longer, and its launch:
    small layers take the path with the fewest launches, large ones leave the wide product to the
    library. How many processors a small product keeps busy is not modelled.
    """
    m, n, k, rank, dtype = shape
    size = dtype.itemsize
    rate = LIBRARY_SHARE * (machine.half_flops if size == 2 else machine.single_flops)
    own_rate = rate * OWN_SHARE[2 if size == 2 else 4]

    def copying(elements: int) -> float:
        return elements * size / machine.bandwidth

    def product(depth: float, columns: int, elements: int, rate: float) -> float:
        return max(2 * m * columns * depth / rate, copying(elements))

    inputs, outputs = m * k, m * n
    moved = inputs + n * k + outputs
    launches = sum(LAUNCHES[backend][path]) * LAUNCH_SECONDS
    if path == "skinny":
        # r is written, and read by the product that adds to it; dh is read and written once more
        forward = copying(inputs + outputs) + product(k, n, moved + outputs, rate)
        return launches + forward + product(n, k, moved, rate) + copying(2 * inputs)
    backward = product(n + rank, k, moved, own_rate)
    if path == "fused":
        depth = k * (1 + rank / FUSED_TILE) + rank
        return launches + product(depth, n, moved, own_rate) + backward
    return launches + copying(inputs) + product(k + rank, n, moved, own_rate) + backward
