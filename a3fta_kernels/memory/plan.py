"""Which batch, level and precision fit into a memory: predictions for a whole training step.

    need(batch) = weights + optimizer + max(peak(batch), gradients + update) + allowance

weights: the model with its adapters. optimizer: AdamW's two moments, in the dtype of what trains.
peak: `step_peak`'s, of inputs, activations and gradients, and of temporary tensors. update: the
copy of what trains that PyTorch's AdamW makes while it steps. allowance: what no tensor of the step
holds; see `allowance_of`. Above batch 1 every tensor is either of the batch's size or independent
of it, so that peak is a line, which batches 2 and 3 give; at batch 1 some copies become views, and
the line is an upper bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context

import torch

from ..checks import check_choice
from . import methods, models, packed
from .account import mib
from .levels import LEVELS
from .peak import Peak, step_peak

# On an H200 a context with its loaded kernels took 788 MiB. Beside that a share of 7.0 to 7.6 % of
# 12 and 24 GiB, for workspaces and what the caching allocator cannot use of its blocks, finds the
# six largest batches of benchmarks/bench_largest.py.
CONTEXT = 788 << 20
UNUSABLE = 0.075
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLES = (2, 3)  # the batches that are run


@dataclass(frozen=True)
class Job:
    """One training set-up: the arguments of a run on fake tensors."""

    model: str
    resolution: int
    method: str
    rank: int | None
    level: str
    precision: str
    batch: int
    quantize: str = "no"


def run(job: Job) -> Peak:
    """The peak of one step of `job`."""
    dtype = PRECISIONS[job.precision]
    model = models.build(job.model, dtype)
    packed.pack(model, job.quantize)
    methods.adapt(model, job.method, job.rank, dtype)
    LEVELS[job.level].apply(model)
    return step_peak(model, **models.inputs(model, job.resolution, job.batch, dtype))


@dataclass(frozen=True)
class Row:
    """A level in a precision: bytes as a line over the batch. batch: the largest that fits."""

    level: str
    precision: str
    weights: int
    optimizer: int
    gradients: int
    update: int
    per_sample: int
    constant: int  # of the peak, whatever the batch
    batch: int = 0

    def peak(self, batch: int) -> int:
        return max(self.constant + self.per_sample * batch, self.gradients + self.update)

    def need(self, batch: int, allowance: int) -> int:
        """Bytes of a training step with this batch."""
        return self.weights + self.optimizer + self.peak(batch) + allowance


@dataclass(frozen=True)
class Plan:
    """What fits. best: the recommended row, and batch the batch; None where nothing fits."""

    model: str
    resolution: int
    method: str
    rank: int | None
    quantize: str
    memory: int
    allowance: int
    rows: tuple[Row, ...]
    best: Row | None
    batch: int
    confirmed: int | None  # bytes that a run with the recommended batch itself needs

    @property
    def least(self) -> tuple[Row, int]:
        """The row that needs least at batch 1, and how much."""
        row = min(self.rows, key=lambda r: r.need(1, self.allowance))
        return row, row.need(1, self.allowance)

    def to_json(self, indent: int | None = None) -> str:
        found = asdict(self)
        least, need = self.least
        found["least"] = {"level": least.level, "precision": least.precision, "bytes": need}
        return json.dumps(found, indent=indent)


def make_plan(
    model: str,
    memory: int,
    resolution: int | None = None,
    method: str = "a3fta",
    rank: int | None = None,
    batch: int | None = None,
    levels: Iterable[str] = LEVELS,
    precisions: Iterable[str] = PRECISIONS,
    allowance: int | None = None,
    workers: int = 1,
    quantize: str = "no",
    progress: Callable[[], None] = lambda: None,
) -> Plan:
    """The largest batch of every level and precision in `memory` bytes, and a recommendation.

    Args:
        model, resolution: as `models.build` and `models.inputs` take them; None: its own.
        method, rank: as `methods.adapt` takes them.
        batch: recommend the cheapest level, then precision, that fits this batch. None: the
            largest batch that fits; of equals the cheapest.
        levels, precisions: keys of LEVELS and PRECISIONS, cheapest first.
        allowance: bytes that no tensor of the step holds. None: as `allowance_of` says.
        workers: processes. progress: is called after every run.
        quantize: "nf4" has linear layers of 4 bits, as `packed` counts them. Not with "full".

    Raises what the functions above raise.
    """
    check_choice("quantize", quantize, packed.QUANTIZE)
    if quantize != "no" and method == "full":
        raise ValueError(
            f"quantize: expected no beside method full, as packed weights do not train, got "
            f"{quantize}"
        )
    resolution = models.resolution_of(model) if resolution is None else resolution
    allowance = allowance_of(memory) if allowance is None else allowance
    kinds = [(level, precision) for precision in precisions for level in levels]
    jobs = [
        Job(model, resolution, method, rank, level, precision, size, quantize)
        for level, precision in kinds
        for size in SAMPLES
    ]
    # what needs no run shows before the long part
    narrow = min((PRECISIONS[name] for _, name in kinds), key=lambda dtype: dtype.itemsize)
    built = models.build(model, narrow)
    models.inputs(built, resolution)
    packed.pack(built, quantize)
    weights = sum(p.nbytes for p in built.parameters())
    if memory <= weights:
        raise ValueError(
            f"memory: expected more than the {mib(weights)} of the model's weights alone, "
            f"got {mib(memory)}"
        )
    peaks = _all(jobs, workers, progress)
    rows = tuple(
        _row(jobs[i], peaks[i], peaks[i + 1], memory - allowance)
        for i in range(0, len(jobs), len(SAMPLES))
    )
    fitting = [row for row in rows if row.batch >= (batch or 1)]
    if batch is None:
        # max takes the first of equals
        best = max(fitting, key=lambda row: row.batch, default=None)
    else:
        best = next(iter(fitting), None)
    chosen = 0 if best is None else batch or best.batch
    confirmed = None
    if best is not None:
        job = Job(model, resolution, method, rank, best.level, best.precision, chosen, quantize)
        exact = run(job).bytes
        progress()
        confirmed = best.weights + best.optimizer + allowance
        confirmed += max(exact, best.gradients + best.update)
    found = methods.METHODS[method].rank if rank is None else rank
    return Plan(
        model, resolution, method, found, quantize, memory, allowance, rows, best, chosen, confirmed
    )


def allowance_of(memory: int) -> int:
    """What is set aside of a device's memory for the CUDA context, workspaces and fragmentation."""
    return CONTEXT + round(UNUSABLE * memory)


def runs(levels: Iterable[str] = LEVELS, precisions: Iterable[str] = PRECISIONS) -> int:
    """How many times `make_plan` calls `progress`."""
    return len(list(levels)) * len(list(precisions)) * len(SAMPLES) + 1


def _all(jobs: list[Job], workers: int, progress: Callable[[], None]) -> list[Peak]:
    if workers == 1:
        found = []
        for job in jobs:
            found.append(run(job))
            progress()
        return found
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        for future in futures:
            future.add_done_callback(lambda _: progress())
        return [future.result() for future in futures]


def _row(job: Job, low: Peak, high: Peak, memory: int) -> Row:
    first, second = SAMPLES
    per_sample = max(0, -(-(high.bytes - low.bytes) // (second - first)))
    row = Row(
        job.level, job.precision, low.parameters, 2 * low.trainable, low.gradients,
        low.trainable, per_sample, low.bytes - first * per_sample,
    )  # fmt: skip
    left = memory - row.weights - row.optimizer
    batch = 0
    if left >= row.peak(1):
        batch = (left - row.constant) // per_sample if per_sample else 1
    return Row(**{**vars(row), "batch": batch})
