"""`a3fta sample`: a grid of images from a base and its adapters."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ..memory.packed import QUANTIZE
from ..train.errors import is_out_of_memory
from .errors import CommandError, check_writable, require
from .subject import finite, positive, seed


def _adapter(text: str) -> tuple[str, float]:
    folder, _, weight = text.rpartition("=")
    if not folder or Path(text).is_dir():  # with = in its name
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected FOLDER or FOLDER=WEIGHT, got {text}")
    return folder, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="the pipeline: a folder, or a name on the hub")
    add(
        "--adapter", type=_adapter, action="append", required=True, metavar="FOLDER[=WEIGHT]",
        help="a row of its own; several also together",
    )  # fmt: skip
    add("--prompt", action="append", default=[], help="or a class; several take turns")
    add("--out", type=Path, default=Path("samples.png"), help="the grid")
    add("--count", type=positive, default=4, help="columns, and one for each prompt at least")
    add("--steps", type=positive, default=30, help="denoising steps")
    add("--guidance", type=finite, default=5.0, help="classifier-free guidance")
    add("--seed", type=seed, default=0, help="of the first column's noise")
    add("--resolution", type=positive, help="pixels along an edge (the model's own)")
    add("--precision", default="no", choices=("no", "fp16", "bf16"), help="of the weights")
    add("--variant", default="", help="of the pipeline's files, such as fp16")
    add("--quantize", default="no", choices=QUANTIZE, help="linear layers of the base in 4 bits")
    add("--batch", type=positive, default=1, help="images at a time")
    add("--allow-other-base", action="store_true", help="other weights than it was trained on")


def run(args: argparse.Namespace) -> int:
    require(("diffusers", "transformers", "PIL", "rich"), "train")
    from PIL import Image

    from ..train import TrainingError, sample
    from .progress import Bars

    # before minutes of drawing
    if Image.registered_extensions().get(args.out.suffix.lower()) not in Image.SAVE:
        raise CommandError(f"out: expected a picture's name such as samples.png, got {args.out}")
    check_writable("out", args.out)
    try:
        with Bars() as bars:
            page = sample(
                args.model, args.adapter, args.prompt, count=args.count, steps=args.steps,
                guidance=args.guidance, seed=args.seed, resolution=args.resolution,
                precision=args.precision, quantize=args.quantize, variant=args.variant,
                batch=args.batch, allow_other_base=args.allow_other_base, listener=bars,
            )  # fmt: skip
    except TrainingError as error:
        told = str(error).replace("allow_other_base=True", "--allow-other-base")
        raise CommandError(told) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise CommandError(
            f"out of memory; --precision bf16, --quantize nf4 or a smaller --batch take less "
            f"({str(error).splitlines()[0]})"
        ) from error
    page.save(args.out)
    print(f"{args.out}: {page.width} x {page.height}")
    return 0
