"""`a3fta finetune` from beginning to end, without a download: 20 handwritten digits.

    python examples/finetune_digits.py --out digits

Writes the demo's base, a small class-conditional U-Net that draws printed digits, as a pipeline,
20 handwritten digits as a folder of images with a folder per class, and trains an adapter on them:
by default with folds, as 20 images are too few to spare some. Look at digits/run/report.html.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffusers import DDPMPipeline
from PIL import Image

from a3fta_kernels.cli.demo import base, data
from a3fta_kernels.cli.progress import Bars
from a3fta_kernels.train import Settings, finetune, run_files


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("digits"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--heldout", default="kfold")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--record", type=Path, help="write the figures of docs/finetune.md here")
    args = parser.parse_args(arguments)
    if not args.resume:
        write_pipeline(args.out / "pipeline")
        write_digits(args.out / "photos")
    settings = Settings(
        model=str(args.out / "pipeline"), data=str(args.out / "photos"),
        output=str(args.out / "run"), resume=args.resume, min_side=8, rank=32, steps=args.steps,
        batch=16, learning_rate=1e-3, warmup=20, heldout=args.heldout, evaluate_every=25,
        sample_every=100, sample_count=20, sample_steps=20,
    )  # fmt: skip
    with Bars() as bars:
        adapter = finetune(settings, bars)
    if args.record is not None:
        record(args.out / "run", args.record)
    return adapter


def record(run: Path, target: Path) -> None:
    """The figures of docs/finetune.md: the choice, and the held-out loss that it rests on."""
    found = run_files.Run(run)
    curve, summary = found.heldout, found.summary
    assert curve is not None
    told = ("chosen_step", "folds_best", "why", "rule", "device", "versions")
    facts = {name: summary[name] for name in told}
    facts |= {"steps": curve.steps, "heldout_mean": curve.values}
    facts["folds"] = {str(fold.fold): fold.best() for fold in found.folds}
    target.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (target.with_suffix(".png")).write_bytes((run / "adapter" / "curves.png").read_bytes())


def write_pipeline(folder: Path) -> None:
    start = base.load()
    DDPMPipeline(start.model(), start.noise()).save_pretrained(folder)


def write_digits(folder: Path) -> None:
    digits = data.load(seed=0).train
    for i, (pixels, label) in enumerate(zip(digits.x, digits.y.tolist(), strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(((pixels[0] + 1) * 127.5).round().byte().numpy())
        image.save(folder / str(label) / f"{i}.png")


if __name__ == "__main__":
    print(main())
