"""`a3fta study`: every method on many small training sets, and what may be said of it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
from pathlib import Path
from typing import Any

from .errors import CommandError, require
from .subject import positive

NEEDS = (
    "diffusers", "peft", "sklearn", "scipy", "matplotlib", "numpy", "PIL", "transformers", "yaml",
)  # fmt: skip
STAGES = ("tune", "run", "report")
_PLAN = ("batch", "samples", "sample_steps", "folds", "tuning_k", "guidance", "checkpoints")


def _rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    try:
        found = float(rate)
    except ValueError:
        found = math.nan
    if not (math.isfinite(found) and found > 0):
        raise argparse.ArgumentTypeError(f"expected NAME=RATE, a rate above 0, got {text}")
    return name, found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pair", default="digits", help="digits, or a script: see docs/study.md")
    parser.add_argument("--folder", type=Path, default=Path("a3fta-study"), help="of results")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="at once")
    parser.add_argument("--only", choices=STAGES, help="this stage alone")
    parser.add_argument("--report", type=Path, help="where to write it (STUDY.md of the folder)")
    parser.add_argument("--limit", type=positive, help="stop after so many trials and runs")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which none begins")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone (all)")
    parser.add_argument("--k", nargs="+", type=positive, help="sizes of training sets (20 10 50)")
    parser.add_argument("--seeds", nargs="+", type=int, help="these (0 to 9)")
    parser.add_argument(
        "--rates", nargs="+", type=_rate, metavar="NAME=RATE", help="in place of trials"
    )
    parser.add_argument("--contender", default="", help="the method that the report judges")
    parser.add_argument(
        "--compare", nargs="+", default=(), metavar="NAME",
        help="these against each other method, seed by seed; nothing is judged",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="(cpu for a pair; for a pipeline cuda, if any)"
    )
    parser.add_argument("--bases", type=Path, help="where the pair's base is (the folder)")
    own = parser.add_argument_group("a pipeline of your own")
    own.add_argument("--model", help="as in `a3fta finetune`; takes the place of --pair")
    own.add_argument("--images", help="folder of photos, as in `a3fta finetune --data`")
    own.add_argument("--trigger", default="", help="caption of photos that have none")
    own.add_argument("--resolution", type=positive, help="of training (the model's own)")
    own.add_argument("--features", default="pixels", help="pixels, or an image model's folder")
    plan = parser.add_argument_group("another plan, whose results need another --folder")
    plan.add_argument("--checkpoints", nargs="+", type=positive, metavar="STEP")
    for name in ("batch", "samples", "sample-steps", "folds", "tuning-k"):
        plan.add_argument(f"--{name}", type=positive)
    plan.add_argument("--guidance", type=float)


def run(args: argparse.Namespace) -> int:
    require(NEEDS, "study")
    from ..study.conduct import conduct
    from ..study.table import owned
    from ..train.errors import TrainingError

    try:
        plan, load = _plan(args), _load(args)
        # a report is drawn beside a study that goes on
        with owned(args.folder) if args.only != "report" else contextlib.nullcontext():
            conduct(
                args.folder, plan, load, processes=args.processes,
                stages=(args.only,) if args.only else STAGES, limit=args.limit,
                minutes=args.minutes, given=dict(args.rates or ()), report=args.report,
                say=functools.partial(print, flush=True),
            )  # fmt: skip
    except (TrainingError, ValueError) as error:
        raise CommandError(str(error)) from error
    return 0


def _plan(args: argparse.Namespace) -> Any:
    from ..study.methods import BASELINE, method
    from ..study.plan import Plan

    if bool(args.model) != bool(args.images):
        raise CommandError("--model and --images: expected both or neither")
    changes = {name: getattr(args, name) for name in _PLAN if getattr(args, name) is not None}
    if args.checkpoints:
        changes["checkpoints"] = tuple(args.checkpoints)
    if args.methods:
        # KID is told in percent of the base's
        changes["methods"] = tuple(dict.fromkeys((BASELINE, *args.methods)))
    if args.k:
        changes["ks"] = tuple(args.k)
    if args.seeds:
        changes["seeds"] = tuple(args.seeds)
    for name, _ in args.rates or ():
        if not method(name).trials:
            raise CommandError(f"rates: {name} is not trained, so it has none")
    return dataclasses.replace(
        Plan(), pair=_name(args), contender=args.contender, compared=tuple(args.compare), **changes
    )


def _name(args: argparse.Namespace) -> str:
    """Of another pipeline, other photos or other features: another plan."""
    if not args.model:
        return args.pair
    told = (args.model, args.images, args.trigger, args.resolution, args.features)
    return f"{Path(args.model).name}-{hashlib.sha256(repr(told).encode()).hexdigest()[:8]}"


def _load(args: argparse.Namespace) -> Any:
    """What makes the subject, in this process or another."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device: expected cpu where PyTorch finds no GPU, got cuda")
    if args.model:
        from ..study import pretrained

        return functools.partial(
            pretrained.load, args.model, args.images, args.folder, args.trigger, args.features,
            args.resolution, args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )  # fmt: skip
    from ..checks import check_choice
    from ..study import pairs

    check_choice("pair", args.pair, pairs.PAIRS)
    return functools.partial(pairs.load, args.pair, args.bases or args.folder, args.device or "cpu")
