"""`a3fta plan`: which batch, level and precision fit into a memory."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from ..memory.account import mib, parse_size
from ..memory.levels import LEVELS
from ..memory.packed import QUANTIZE
from ..memory.plan import CONTEXT, PRECISIONS, UNUSABLE, Plan, make_plan, runs
from . import subject
from .errors import CommandError


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subject.add_arguments(parser, "parallel")  # as `a3fta finetune` takes it
    parser.add_argument(
        "--memory", type=_size, required=True, help="of the device: 12GiB, 12GB, 12000MB"
    )
    parser.add_argument(
        "--batch", type=subject.positive, help="wanted images per step (the most that fit)"
    )
    parser.add_argument("--level", choices=LEVELS, help="this level alone (all)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the weights (all)")
    parser.add_argument(
        "--quantize", default="no", choices=QUANTIZE, help="linear layers of the trunk in 4 bits"
    )
    parser.add_argument(
        "--allowance", type=_size,
        help="for the CUDA context, workspaces and fragmentation "
        f"({CONTEXT >> 20}MiB and {100 * UNUSABLE:g} %% of the memory)",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=subject.positive, default=min(4, os.cpu_count() or 1), help="processes"
    )


def run(args: argparse.Namespace) -> int:
    subject.check(args)
    levels = list(LEVELS) if args.level is None else [args.level]
    precisions = list(PRECISIONS) if args.precision is None else [args.precision]
    with _progress(args.json, runs(levels, precisions)) as progress:
        try:
            plan = make_plan(
                args.model, args.memory, args.resolution, args.method, args.rank, args.batch,
                levels, precisions, args.allowance, args.workers, args.quantize,
                progress,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise CommandError(str(error)) from error
    if args.json:
        print(plan.to_json())
    else:
        _print(plan, args.batch)
    if plan.best is None:
        raise CommandError(_too_little(plan, args.batch))
    return 0


def _too_little(plan: Plan, batch: int | None) -> str:
    """The least memory that would do, for what was asked."""
    size = batch or 1
    row = min(plan.rows, key=lambda r: r.need(size, plan.allowance))
    return (
        f"memory: {mib(plan.memory)} fit nothing; batch {size} needs at least "
        f"{mib(row.need(size, plan.allowance))}, with level {row.level} in {row.precision}"
    )


def _print(plan: Plan, batch: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rank = f", rank {plan.rank}" if plan.rank else ""
    packed = f", linear layers in {plan.quantize}" if plan.quantize != "no" else ""
    console.print(
        f"{plan.model} {plan.resolution} x {plan.resolution}, {plan.method}{rank}{packed}, "
        f"in {mib(plan.memory)}",
        style="bold",
        markup=False,
        highlight=False,
    )
    table = Table(title="MiB", title_justify="left")
    for i, name in enumerate(
        ("level", "in", "weights", "AdamW", "peak", "total", "per image", "batch")
    ):
        table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
    for row in plan.rows:
        sizes = (
            row.weights, row.optimizer, row.peak(1), row.need(1, plan.allowance), row.per_sample
        )  # fmt: skip
        table.add_row(
            row.level, row.precision, *(f"{n / 2**20:,.0f}" for n in sizes),
            str(row.batch) if row.batch else "[red]none[/red]",
            style="bold" if row is plan.best else None,
        )  # fmt: skip
    console.print(table)
    console.print(
        f"peak and total at batch 1; total = weights + AdamW + peak + {mib(plan.allowance)} for "
        f"the CUDA context, workspaces and fragmentation; batch: the largest that fits",
        highlight=False,
    )
    if plan.best is not None and plan.confirmed is not None:
        why = "the cheapest level that fits it" if batch else "the largest batch that fits"
        console.print(
            f"batch {plan.batch}, level {plan.best.level} ({LEVELS[plan.best.level].title}), "
            f"{plan.best.precision}: {mib(plan.confirmed)}; {why}",
            highlight=False,
        )


@contextlib.contextmanager
def _progress(quiet: bool, total: int) -> Iterator[Callable[[], None]]:
    if quiet:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task: Any = bar.add_task("steps on fake tensors", total=total)
        yield lambda: bar.advance(task)
