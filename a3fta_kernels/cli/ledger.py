"""`a3fta ledger`: where the memory of a training step goes, on fake tensors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..memory.account import Ledger, mib
from ..memory.levels import LEVELS
from . import subject
from .errors import CommandError, check_writable, require

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser, "a3fta")
    parser.add_argument("--batch", type=subject.positive, default=1, help="images per step")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of the model's weights")
    parser.add_argument("--level", default="stock", choices=LEVELS, help="how lean the model runs")
    parser.add_argument(
        "--depth", type=subject.positive, default=2, help="parts of a module's path in the table"
    )
    parser.add_argument("--rows", type=subject.positive, default=12, help="rows per table")
    parser.add_argument("--out", type=Path, help="write a picture here, such as ledger.png")


def run(args: argparse.Namespace) -> int:
    subject.check(args)
    if args.out is not None:
        require(["matplotlib"], "demo")
        if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise CommandError(f"out: expected a picture's name such as ledger.png, got {args.out}")
        check_writable("out", args.out)
    from ..memory import ledger, methods, models

    dtype = DTYPES[args.dtype]
    try:
        model = models.build(args.model, dtype)
        resolution = args.resolution or models.resolution_of(args.model)
        inputs = models.inputs(model, resolution, args.batch, dtype)
        rank = methods.adapt(model, args.method, args.rank, dtype)
        LEVELS[args.level].apply(model)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error)) from error
    found = ledger(model, **inputs)

    known = models.ARCHITECTURES.get(args.model)
    title = known.title if known else f"{type(model).__name__} of {args.model}"
    trains = args.method + (f" of rank {rank}" if rank else "")
    if args.method == "a3fta":
        trains += f" (backend {methods.backend()})"
    setup = [f"{resolution} x {resolution}", f"batch {args.batch}", args.dtype, trains]
    setup += [args.level] if args.level != "stock" else []
    if args.out is not None:
        from .ledger_picture import draw

        draw(args.out, found, title, ", ".join(setup))
    if args.json:
        print(json.dumps({"model": args.model, "setup": setup, **json.loads(found.to_json())}))
        return 0
    _print(found, f"{title}: {', '.join(setup)}", args.depth, args.rows)
    return 0


def _print(found: Ledger, title: str, depth: int, rows: int) -> None:
    from rich.console import Console

    console = Console()
    console.print(title, style="bold", markup=False, highlight=False)
    console.print(_table("held in a training step", totals(found), 0, ("", "")))
    console.print(_table("saved, by operator", found.by_operator(), rows, ("operator", "saved")))
    console.print(_table("saved, by module", found.by_module(depth), rows, ("module", "saved")))
    largest = _rich("largest tensors", ("module", "operator.tensor", "tensors", "saved", ""))
    for module, operator, tensor, count, size in found.table(rows):
        share = f"{100 * size / max(found.total, 1):.1f} %"
        largest.add_row(module, f"{operator}.{tensor}", str(count), mib(size), share)
    console.print(largest)
    for note in found.notes:
        console.print(f"note: {note}")


def totals(found: Ledger) -> dict[str, int]:
    """What a training step holds, less what comes and goes within it (see `a3fta plan`)."""
    return {
        "saved for backward": found.total,
        "weights and buffers": found.parameters,
        "gradients": found.trainable,
        "AdamW's two moments": 2 * found.trainable,
    }


def _table(title: str, sums: dict[str, int], rows: int, heads: tuple[str, str]) -> Any:
    table = _rich(title, (*heads, ""))
    ranked = list(sums.items())
    whole = sum(sums.values())
    shown = ranked[:rows] if rows else ranked
    rest = sum(size for _, size in ranked[len(shown) :])
    if rest:
        shown = [*shown, (f"{len(ranked) - len(shown)} others", rest)]
    for name, size in shown:
        table.add_row(name, mib(size), f"{100 * size / max(whole, 1):.1f} %")
    return table


def _rich(title: str, columns: tuple[str, ...]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        numbers = column in ("saved", "tensors", "") and i > 0
        table.add_column(column, justify="right" if numbers else "left")
    return table
