"""`a3fta backends`: what runs here, and why not what does not."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json

from ..backends import backends


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    found = backends()
    if args.json:
        print(json.dumps({k: dataclasses.asdict(v) for k, v in found.items()}, indent=2))
        return 0
    if importlib.util.find_spec("rich") is None:  # the bare package must be able to explain itself
        for name, status in found.items():
            print(f"{name:10} {status}")
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="a3fta_kernels backends", title_justify="left")
    for column in ("backend", "runs on", "why"):
        table.add_column(column)
    for name, status in found.items():
        where = ", ".join(status.devices) if status.available else "[red]not here[/red]"
        table.add_row(name, where, status.reason)
    Console().print(table)
    return 0
