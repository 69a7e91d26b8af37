"""`a3fta demo`: adapts a small diffusion model from printed to handwritten digits.

The base has only seen printed digits; every method then trains on the same 20 real handwritten
ones, on the same batches and noise. Modules: data, base (the pre-trained model, sampling),
training, metrics, report (table, caption), picture, compare (one run of all of it).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import require

NEEDS = ("diffusers", "peft", "sklearn", "matplotlib", "rich", "numpy")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder for results")
    parser.add_argument("--steps", type=_positive, default=500, help="training steps per method")
    parser.add_argument("--rank", type=_positive, default=32, help="rank of the A3FTA adapter")
    parser.add_argument("--seed", type=int, default=0, help="choice of digits, noise and batches")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "reference", "triton", "native"),
        help="what computes the adapter",
    )
    # 8 x 8 images: little work to share, and two threads lose much on cores that others use too
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps and samples, to see that it works"
    )


def run(args: argparse.Namespace) -> int:
    require(NEEDS, "demo")
    from .compare import Options, compare

    options = Options(
        output=args.output,
        steps=min(args.steps, 6) if args.quick else args.steps,
        rank=args.rank,
        seed=args.seed,
        backend=args.backend,
        threads=args.threads,
        samples=20 if args.quick else 300,
        sampling_steps=3 if args.quick else 25,
        eval_every=3 if args.quick else 25,
    )
    compare(options)
    return 0
