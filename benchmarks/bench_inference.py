"""One call of an adapted denoiser, as a sampler makes it: `python benchmarks/bench_inference.py`.

Without gradients, on the U-Nets of step_models.py, beside the frozen base and PEFT LoRA; a batch of
four images, all with one adapter or each with its own. The cells take turns in one loop, and those
of one group have to give the same. Writes results/inference_<device>.json and prints a table: time
of a call, that over the frozen base's, images per second of the denoiser alone at 30 calls an
image, kernels or operators, peak memory above the weights.

    --only PATTERN      cells whose name matches ("SDXL 1024x1024, batch 4 | A3FTA r64"); the frozen
                        base is beside them
    --without PATTERN   leaves such cells out
    --list              names the cells and measures nothing

Exit status is not zero where a cell was wrong or failed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import a3fta_kernels as a3fta  # noqa: E402
from benchmarks import measure, step_measure  # noqa: E402
from benchmarks.bench_step import add_options, asked, environment, parsed  # noqa: E402
from benchmarks.run import write  # noqa: E402
from benchmarks.step_methods import RANK, fill, lora  # noqa: E402
from benchmarks.step_models import Model, models  # noqa: E402
from benchmarks.variants import CannotRun  # noqa: E402

BATCH, CALLS = 4, 30
USERS = tuple(f"user{i}" for i in range(BATCH))
# greatest error of a group's cells, as a share of the first one's norm
FAR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Run = Callable[[], Tensor]
Prepare = Callable[[Any, dict[str, Any]], Run]


@dataclass(frozen=True)
class Cell:
    """prepare(model, inputs): what makes one call. group: cells that give the same; "": any.
    changes: whether it writes to the base's weights, so that it needs some of its own."""

    name: str
    prepare: Prepare
    group: str = ""
    changes: bool = False

    def __str__(self) -> str:
        return self.name


def once(model: Any, inputs: dict[str, Any]) -> Run:
    return lambda: model(**inputs, return_dict=False)[0]


def _lora(fused: bool) -> Prepare:
    def prepare(model: Any, inputs: dict[str, Any]) -> Run:
        if importlib.util.find_spec("peft") is None:
            raise CannotRun("peft is not installed")
        lora(model, 16)
        fill(model)
        if fused:
            model.fuse_lora()
        return once(model, inputs)

    return prepare


def _ours(
    activation: str = "gelu", backend: str = "auto", then: Callable[[Any], Any] = lambda _: None
) -> Prepare:
    def prepare(model: Any, inputs: dict[str, Any]) -> Run:
        a3fta.inject(model, a3fta.AdapterConfig(rank=RANK, activation=activation), backend=backend)
        fill(model)
        then(model)
        return once(model, inputs)

    return prepare


def _users(model: Any) -> None:
    for name in USERS:
        a3fta.inject(model, a3fta.AdapterConfig(rank=RANK), name)
    # what trains is filled
    a3fta.set_trainable(model)
    fill(model)


def _per_sample(model: Any, inputs: dict[str, Any]) -> Run:
    _users(model)

    def run() -> Tensor:
        with a3fta.adapters_per_sample(model, USERS):
            return model(**inputs, return_dict=False)[0]

    return run


def _one_by_one(model: Any, inputs: dict[str, Any]) -> Run:
    """A call for each image: what one does without `adapters_per_sample`."""
    _users(model)
    alone = [_sample(inputs, i) for i in range(BATCH)]

    def run() -> Tensor:
        found = []
        for name, single in zip(USERS, alone, strict=True):
            a3fta.set_adapters(model, name)
            found.append(model(**single, return_dict=False)[0])
        return torch.cat(found)

    return run


def _replayed(prepare: Prepare) -> Prepare:
    """The call as one CUDA graph: what the GPU takes, however long Python takes to start it."""

    def made(model: Any, inputs: dict[str, Any]) -> Run:
        run, graph, side = prepare(model, inputs), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # tiles are chosen, libraries loaded
                run()
        here = torch.cuda.current_stream()
        here.wait_stream(side)
        try:
            with torch.cuda.graph(graph, stream=side):
                y = run()
        except Exception:  # one that breaks off may leave the stream that it was captured on
            torch.cuda.set_stream(here)
            raise

        def replay(held: Run = run) -> Tensor:  # a graph does not hold the weights that it reads
            graph.replay()
            return y

        return replay

    return made


def _sample(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {name: _sample(value, i) for name, value in inputs.items()}
    return inputs[i : i + 1]


FROZEN = Cell("frozen base", once)
CELLS = (
    FROZEN,
    Cell("PEFT LoRA r16", _lora(fused=False), "lora"),
    Cell("PEFT LoRA r16, fused", _lora(fused=True), "lora", changes=True),
    Cell(f"A3FTA r{RANK}, eager", _ours(backend="reference"), "gelu"),
    Cell(f"A3FTA r{RANK}", _ours(), "gelu"),
    Cell(f"A3FTA r{RANK}, frozen for inference", _ours(then=a3fta.freeze_for_inference), "gelu"),
    Cell(f"A3FTA r{RANK}, linear", _ours("identity"), "linear"),
    Cell(
        f"A3FTA r{RANK}, linear, merged", _ours("identity", then=a3fta.merge), "linear",
        changes=True,
    ),
    Cell(f"A3FTA r{RANK}, an adapter per image, one by one", _one_by_one, "users"),
    Cell(f"A3FTA r{RANK}, an adapter per image", _per_sample, "users"),
)  # fmt: skip
# with CUDA alone
REPLAYED = tuple(
    replace(cell, name=f"{cell}, graph", prepare=_replayed(cell.prepare))
    for cell in (CELLS[0], CELLS[1], CELLS[4], CELLS[5])
)


@dataclass
class Call:
    """What `step_measure.clock` takes."""

    call: Run

    def run(self, _: int = 0) -> None:
        self.call()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="calls of adapted denoisers, ours and rivals'")
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=10.0, help="of rounds for each model")
    options, device = parsed(parser, arguments)
    plan = chosen(device.type, options)
    if not plan:
        parser.error(f"--only {options.only!r}, --without {options.without!r}: no cell is left")
    if options.list:
        print("\n".join(f"{model} | {cell}" for model, cells in plan for cell in cells))
        return 0
    return run(plan, device, options)


def chosen(device: str, options: argparse.Namespace) -> list[tuple[Model, tuple[Cell, ...]]]:
    """Each model once, with a batch of images; the frozen base beside what is asked for."""
    found = {}
    for model in models(device, options.quick):
        of_images = replace(model, batch=BATCH)
        possible = (*CELLS, *REPLAYED) if device == "cuda" else CELLS
        cells = tuple(
            cell for cell in possible if cell == FROZEN or asked(f"{of_images} | {cell}", options)
        )
        if len(cells) > 1:
            found[of_images.name] = of_images, cells
    return list(found.values())


def run(
    plan: list[tuple[Model, tuple[Cell, ...]]], device: torch.device, options: argparse.Namespace
) -> int:
    about = environment(device) | {"quick": options.quick}
    about |= {"commit": options.commit} if options.commit else {}
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"inference_{measure.file_stem(device)}{'-quick' * options.quick}.json"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    end = time.perf_counter() + 60 * options.minutes
    seconds = 0.0 if options.quick else options.seconds
    limits = step_measure.Limits(seconds, 3 if options.quick else 5, end)
    rows: list[dict[str, Any]] = []
    absent: list[dict[str, Any]] = []
    for model, cells in plan:
        print(f"\n{model}: {len(cells)} cells", flush=True)
        found, missing = measure_model(model, cells, device, dtype, limits)
        rows += found
        absent += missing
        write(options.out / name, {"environment": about, "absent": absent, "rows": rows})
        print_rows(found, missing)
    print(f"\nwritten: {options.out / name}")
    return int(any(row["reason"].startswith("failed: ") for row in absent))


def measure_model(
    model: Model, cells: tuple[Cell, ...], device: torch.device, dtype: torch.dtype,
    limits: step_measure.Limits,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Rows of what was measured, and the reasons of what was not."""
    trunk = model.trunk(device, dtype).eval()
    inputs = model.inputs(device, dtype)
    del inputs["target"]
    calls: dict[Any, Call] = {}
    facts: dict[Any, dict[str, Any]] = {}
    absent: dict[Any, str] = {}
    truths: dict[str, Tensor] = {}
    with torch.no_grad():
        for cell in cells:
            if limits.over:
                absent[cell] = "the minutes were over"
                continue
            try:
                call = Call(cell.prepare(own(trunk, cell), inputs))
                check(cell, call.call(), truths, dtype)
                # a graph holds its memory for good
                peak = None if cell in REPLAYED else measure.peak_bytes(call.run, device)
                facts[cell], calls[cell] = {"peak_bytes": peak}, call
            except Exception as error:  # one that fails must not hide the others
                absent[cell] = step_measure.reason(error)
            step_measure.release(device)
        clocks: dict[Any, Any] = {
            cell: step_measure.clock(call, device)  # type: ignore[arg-type]
            for cell, call in calls.items()
        }
        samples, failed = step_measure.rounds(clocks, limits)
        for cell in samples:  # after all rounds: once used, CUPTI makes every launch slower
            if limits.over:  # what was timed has to be written yet
                break
            try:
                facts[cell]["counts"] = measure.count(calls[cell].run, device, warm=True)
            except Exception as error:  # its times stand
                print(f"  {cell}: kernels are not counted: {step_measure.reason(error)}")
    absent |= failed
    label = {
        "model": model.name, "batch_size": model.batch, "like": model.like,
        "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    rows = [
        label | {"cell": str(cell)} | facts[cell] | step_measure.timed(taken, device)
        for cell, taken in samples.items()
    ]
    base = next((row["q50_us"] for row in rows if row["cell"] == FROZEN.name), None)
    for row in rows:
        row["of_frozen"] = row["q50_us"] / base if base else None
        row["images_per_second"] = model.batch / (CALLS * row["q50_us"] / 1e6)
    return rows, [label | {"cell": str(c), "reason": why} for c, why in absent.items()]


def own(trunk: nn.Module, cell: Cell) -> nn.Module:
    """A model for the cell; tensors that it only reads are the trunk's."""
    shared = () if cell.changes else (*trunk.parameters(), *trunk.buffers())
    return copy.deepcopy(trunk, {id(x): x for x in shared})


def check(cell: Cell, y: Tensor, truths: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Holds what it gives to what the first cell of its group gave."""
    if not bool(y.isfinite().all()):
        raise step_measure.Wrong("it gives values that are not finite")
    if not cell.group:
        return
    truth = truths.setdefault(cell.group, y.double())
    off = float((y.double() - truth).norm() / truth.norm())
    if off > FAR[dtype]:
        raise step_measure.Wrong(f"{off:.3g} off what its group gives, at most {FAR[dtype]:g}")


def print_rows(rows: list[dict[str, Any]], absent: list[dict[str, Any]]) -> None:
    for row in rows:
        parts = [f"{row['q50_us'] / 1e3:8.1f} ms", f"{row['images_per_second']:.3g} images/s"]
        if row["of_frozen"]:
            parts.insert(1, f"{row['of_frozen']:.2f}x frozen")
        if row["peak_bytes"] is not None:
            parts.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB")
        parts += [f"{count} {what}" for what, count in row.get("counts", {}).items()]
        print(f"  {row['cell']:48s} {', '.join(parts)}")
    for row in absent:
        print(f"  {row['cell']:48s} {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
