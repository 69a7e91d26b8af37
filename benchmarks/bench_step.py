"""A whole training step of a U-Net, ours and its rivals: `python benchmarks/bench_step.py`.

Forward, loss, backward and AdamW over what trains. The models stand in step_models.py, the methods
and the table of cells in step_methods.py, how a batch of cells is measured in step_measure.py.
Writes results/step_<device>.json and prints a table: time of a step, peak memory above the trunk's
weights, bytes saved for backward, kernels or operators, trainable parameters.

Rows of the file that were not measured again stay, if they are of the same device, so that short
runs add up; each row says of which commit it is. Ratios are of times from one loop: each row names,
under `beside`, what the cells of its batch took in the same rounds. A cell that was not measured is
named, with the reason. Exit status is not zero where a cell was wrong or failed.

    --only PATTERN      cells, models or batches whose name matches
                        ("SDXL 1024x1024, batch 4 | adapters | A3FTA r64 | exact")
    --without PATTERN   leaves such cells out
    --minutes N         begins no cell after this
    --compile           torch.compile on the CPU too, where it takes many minutes
    --list              names the cells and measures nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import measure, predict_step, step_measure  # noqa: E402
from benchmarks.run import write  # noqa: E402
from benchmarks.step_methods import ANCHOR, COMPILE, Batch, Cell, batches  # noqa: E402
from benchmarks.step_models import Model, models  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="whole training steps, ours and rivals")
    add_options(parser)
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds for each batch")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--compile", action="store_true", help="on the CPU too")
    options, device = parsed(parser, arguments)
    plan = list(chosen(device.type, options))
    if not plan:
        parser.error(f"--only {options.only!r}, --without {options.without!r}: no cell is left")
    if options.list:
        print("\n".join(full_name(m, b, c) for m, b in plan for c in b.cells))
        return 0
    return run(plan, device, options)


def add_options(parser: argparse.ArgumentParser, quick: str = "a tiny model, few rounds") -> None:
    """What every benchmark of whole models takes."""
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--only", default="", help="a pattern of cells to measure")
    parser.add_argument("--without", default="", help="a pattern of cells to leave out")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no cell after this")
    parser.add_argument("--commit", default="", help="named in the results where git is not there")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")


def parsed(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, torch.device]:
    """The options and their device. Exits where a pattern is none, or the device is not here."""
    options = parser.parse_args(arguments)
    for name in ("only", "without"):
        try:
            re.compile(getattr(options, name))
        except re.error as error:
            parser.error(f"--{name}: expected a regular expression: {error}")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available() and not options.list:
        parser.exit(2, f"{parser.prog}: --device cuda, but no GPU is usable here\n")
    return options, device


def asked(name: str, options: argparse.Namespace) -> bool:
    """Whether a cell of that name is to be measured."""
    out = options.without and re.search(options.without, name)
    return bool(re.search(options.only, name)) and not out


def full_name(model: Model, batch: Batch, cell: Cell) -> str:
    return f"{model} | {batch.name} | {cell}"


def chosen(device: str, options: argparse.Namespace) -> Iterator[tuple[Model, Batch]]:
    """The first batch of every model, then the second of every model."""
    for index in range(len(batches(device))):
        for model in models(device, options.quick):
            table = batches(device, model.brief)
            if index >= len(table):
                continue
            batch = table[index]

            def wanted(cell: Cell, model: Model = model, batch: Batch = batch) -> bool:
                return asked(full_name(model, batch, cell), options)

            # the anchor alone would compare with nothing
            found = step_measure.needed(batch, wanted)
            if found is not None and any(cell != ANCHOR for cell in found.cells):
                yield model, found


def run(plan: list[tuple[Model, Batch]], device: torch.device, options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    about = environment(device) | {"quick": options.quick}
    about |= {"commit": options.commit} if options.commit else {}
    if about["load"] > 0.5 and device.type == "cpu":
        print(f"bench_step: other work runs here (load {about['load']}): expect noise, run again")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = f"step_{measure.file_stem(device)}{'-quick' * options.quick}"
    path = options.out / f"{stem}.json"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    least = 3 if options.quick else 5
    end = time.perf_counter() + 60 * options.minutes
    limits = step_measure.Limits(0.0 if options.quick else options.seconds, least, end)
    # of what a GPU holds
    predicted = {key(row): row["peak_bytes"] for row in predict_step.read()["rows"]}
    failed = False
    held: tuple[Model, torch.nn.Module] | None = None
    for model, batch in plan:
        print(f"\n{model}, {batch.name}: {len(batch.cells)} cells", flush=True)
        if batch.name == "compiled" and device.type == "cpu" and not options.compile:
            found = step_measure.Found(absent=not_compiled(batch))
        else:
            if held is None or held[0] != model:
                held = None
                gc.collect()
                held = model, model.trunk(device, dtype)
            found = step_measure.measure_batch(model, held[1], batch, device, limits)
        rows = [labelled(model, dtype, cell) | row for cell, row in found.rows.items()]
        for row in rows:
            row["predicted_bytes"] = predicted.get(key(row))
        absent = [
            labelled(model, dtype, cell) | {"batch": batch.name, "reason": why}
            for cell, why in found.absent.items()
        ]
        write(path, merged(path, {"environment": about, "absent": absent, "rows": rows}))
        print_batch(rows, absent)
        failed |= any(why.startswith("failed: ") for why in found.absent.values())
    print(f"\nwritten: {path}")
    return int(failed)


def not_compiled(batch: Batch) -> dict[Cell, str]:
    why = "compiling takes many minutes on a CPU: --compile asks for it"
    return {cell: why for cell in batch.cells if COMPILE in cell.variant}


def environment(device: torch.device) -> dict[str, Any]:
    import diffusers

    found = measure.environment(device) | {"diffusers": diffusers.__version__}
    for package in ("peft", "xformers"):
        found[package] = measure._version(package)
    return found


def labelled(model: Model, dtype: torch.dtype, cell: Cell) -> dict[str, Any]:
    return {
        "model": model.name, "batch_size": model.batch, "like": model.like,
        "dtype": str(dtype).removeprefix("torch."), "method": cell.method, "variant": cell.variant,
    }  # fmt: skip


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("model", "batch_size", "dtype", "method", "variant"))


def merged(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Rows of the same device that were not measured now stay, each with its commit.

    Of a cell that several batches measure the row of the first batch stays, as long as that one is
    not measured again; what the other batches' cells are compared to is in their `beside`.
    """
    before: dict[str, Any] = {"rows": [], "absent": []}
    if path.exists():
        old = json.loads(path.read_text())
        same = ("device", "torch", "triton", "peft", "quick")
        if all(old["environment"].get(k) == found["environment"].get(k) for k in same):
            before = old
        else:
            print(f"{path.name} is of another device, or of other versions: its rows are dropped")
    rows = {key(r): {"commit": before["environment"]["commit"], **r} for r in before["rows"]}
    order = [batch.name for batch in batches("cuda")]
    for row in found["rows"]:
        row["commit"] = found["environment"]["commit"]
        kept = rows.get(key(row))
        later = kept is not None and kept["commit"] != row["commit"]
        if kept is None or later or order.index(row["batch"]) <= order.index(kept["batch"]):
            rows[key(row)] = row
    absent = {key(r): r for r in (*before["absent"], *found["absent"]) if key(r) not in rows}
    return found | {"absent": list(absent.values()), "rows": list(rows.values())}


def print_batch(rows: list[dict[str, Any]], absent: list[dict[str, Any]]) -> None:
    base = next((r["q50_us"] for r in rows if key(r)[-2:] == tuple(ANCHOR)), None)
    for row in rows:
        parts = [f"{row['q50_us'] / 1e3:9.1f} ms [{row['q20_us'] / 1e3:.1f}, "
                 f"{row['q80_us'] / 1e3:.1f}]"]  # fmt: skip
        if base:
            parts.append(f"{row['q50_us'] / base:.2f}x LoRA")
        for name, label in (("peak_bytes", "peak"), ("saved_bytes", "saved")):
            if row.get(name) is not None:
                parts.append(f"{label} {row[name] / 2**20:.0f} MiB")
        parts += [f"{v} {k}" for k, v in row.get("counts", {}).items()]
        parts.append(f"{row['trainable_parameters'] / 1e6:.2f} M train")
        name = f"{row['method']} | {row['variant']}"
        print(f"  {name:56s} {', '.join(parts)}")
    for row in absent:
        print(f"  {row['method']} | {row['variant']}: not measured: {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
