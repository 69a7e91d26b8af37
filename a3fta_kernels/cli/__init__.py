"""The command `a3fta`: one module per subcommand, listed in COMMANDS.

A module offers `add_arguments(parser)` and `run(args) -> int`, the exit code, and imports
what is heavy inside `run`. Exit codes: 0 done, 1 it failed (the reason is on stderr), 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from ..backends import BackendUnavailableError
from .errors import CommandError

COMMANDS = {
    "backends": "what can run on this machine, and the reason for what cannot",
    "ledger": "where the memory of a training step goes, counted without running it",
    "plan": "which batch, level and precision of a training step fit into a memory",
    "finetune": "train an adapter on a folder of photos, and watch it for overfitting",
    "sample": "a grid of images from a base and its adapters",
    "study": "every method on many small training sets, and what may be said of it",
    "demo": "adapt a small diffusion model to 20 handwritten digits, against its rivals",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="a3fta", description="Adapter-augmented attention fine-tuning for diffusion models."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f".{name}", __package__)
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (CommandError, BackendUnavailableError, OSError) as error:
        print(f"a3fta {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"a3fta {args.command}: interrupted", file=sys.stderr)
        return 130
