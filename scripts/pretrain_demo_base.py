"""Pre-trains the demo's base model: a small class-conditional U-Net that draws printed digits.

    python scripts/pretrain_demo_base.py    # writes a3fta_kernels/data/demo_base.safetensors

The data are the digits 0-9 of the text fonts that matplotlib ships, drawn the way the target
(scikit-learn's handwritten digits) was scanned: a 32 x 32 bitmap that the digit fills from top
to bottom, counted in blocks of 4 x 4, so 8 x 8 pixels of 0 to 16. Shift, scale, shear, rotation
and stroke width vary; no target image is used. Weights are an exponential average, stored in
float16 with the model's and the scheduler's configuration in the file's metadata.

Needs the "demo" extra, and ten to fifteen minutes of one core. The same seed on the same machine
gives the same weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from a3fta_kernels.study import bases
from a3fta_kernels.study.glyphs import SCRIPTS, Frame, render
from a3fta_kernels.study.glyphs import batch as draw

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "a3fta_kernels" / "data" / "demo_base.safetensors"
FRAME = Frame(side=8, block=4, canvas=96, height=64)

MODEL = {
    "sample_size": FRAME.side,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (48, 80),
    "layers_per_block": 1,
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 16,
    "num_class_embeds": 10,
}
SCHEDULER = bases.SCHEDULE


def glyphs() -> tuple[Tensor, Tensor]:
    """Every digit of every font, and its class."""
    return render(SCRIPTS["digits"], FRAME)


def batch(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`size` augmented digits: x (size, 1, 8, 8) in -1..1 on the target's 17 grey levels."""
    return draw(images, labels, size, FRAME, generator)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    images, labels = glyphs()
    model = bases.pretrain(
        MODEL, SCHEDULER, lambda rng: batch(images, labels, args.batch_size, rng),
        args.steps, args.lr, args.seed, args.log_every,
    )  # fmt: skip
    note = {"steps": args.steps, "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed}
    bases.save(model, args.output, MODEL, SCHEDULER, note)
    print(f"wrote {args.output}, {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
