"""What `a3fta ledger` and `a3fta plan` are asked about: a model, a method, a resolution."""

from __future__ import annotations

import argparse
import math

from ..memory.methods import METHODS
from ..memory.models import ARCHITECTURES
from .errors import require


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected an integer from 0 to {2**32 - 1}, got {text}")
    return int(text)


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """`method`: of METHODS, where none is named."""
    known = ", ".join(ARCHITECTURES)
    parser.add_argument(
        "--model", required=True, help=f"{known}, or a folder with a diffusers model's config.json"
    )
    parser.add_argument("--resolution", type=positive, help="pixels along an edge (its own)")
    parser.add_argument("--method", default=method, choices=METHODS, help="what trains")
    ranks = ", ".join(f"{m.rank} for {name}" for name, m in METHODS.items() if m.rank is not None)
    parser.add_argument("--rank", type=positive, help=f"of adapters or LoRA ({ranks})")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def check(args: argparse.Namespace) -> None:
    """Raises CommandError, naming the extra, where a package is missing."""
    needs = ["diffusers"] + (["peft"] if args.method.startswith("lora") else [])
    require(needs if args.json else [*needs, "rich"], "demo")
