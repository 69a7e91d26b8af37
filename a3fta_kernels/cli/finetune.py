"""`a3fta finetune`: an adapter from a folder of photos."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..train.errors import is_out_of_memory
from ..train.settings import Settings, given, read_yaml
from ..train.settings import add_arguments as add_settings
from .errors import CommandError, require

NEEDS = ("diffusers", "accelerate", "transformers", "PIL", "matplotlib", "rich", "yaml")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="YAML with the same names; flags win")
    parser.add_argument(
        "--print-config", action="store_true", help="print the settings as YAML, and stop"
    )
    add_settings(parser)


def run(args: argparse.Namespace) -> int:
    require(NEEDS, "train")
    try:
        values = read_yaml(args.config) if args.config else {}
        if args.print_config:  # of a run that is not told yet, a template
            values = {"model": "path/to/pipeline", "data": "path/to/photos", **values}
        settings = Settings.from_dict({**values, **given(args)})
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error
    if args.print_config:
        print(settings.to_yaml(), end="")
        return 0
    from ..train import TrainingError, finetune
    from .progress import Bars

    try:
        with Bars() as bars:
            folder = finetune(settings, bars)
    except TrainingError as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        print("a3fta finetune: interrupted; the same with --resume goes on", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CommandError(
            f"out of memory; `a3fta plan` says what fits; --lean block, --norms int8 or "
            f"--gradient-checkpointing take less, also with --resume; a smaller --batch does, with "
            f"another --output ({str(error).splitlines()[0]})"
        ) from error
    if not bars.quiet:
        print(f"{folder}: the adapter and its card; {folder.parent / 'report.html'}: how it went")
    return 0
