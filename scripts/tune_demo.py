"""The search behind the demo's learning rates: every method over the same grid.

    python scripts/tune_demo.py --seed 1

Uses other digits than the demo does by default (another seed). Each line gives the loss on the
selection digits at the last step and at the best one, and what the samples of both are worth;
a3fta_kernels/cli/demo/compare.py holds the choice and says how it was made.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from a3fta_kernels.cli.demo import base, compare, data, training
from a3fta_kernels.cli.demo.report import Row

GRID = {
    "a3fta": (1e-3, 3e-3, 1e-2),
    "full": (1e-4, 3e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=GRID, default=list(GRID))
    args = parser.parse_args(argv)
    start, digits = base.load(), data.load(args.seed)
    judge = compare.Judge(digits, start, args.seed, args.samples, 25)
    settings = training.Settings(steps=args.steps, seed=args.seed)
    torch.set_num_threads(args.threads)
    print("method      lr  at   step  selection  held-out  copies   KID  recall  legible")
    for method in compare.methods(args.rank, "auto"):
        for lr in GRID[method.key] if method.key in args.methods else ():
            run = training.fine_tune(
                dataclasses.replace(method, lr=lr), start.model(), digits, start.noise(), settings
            )
            for at, step in (("last", run.losses.steps[-1]), ("best", run.best_step)):
                row = Row(method.key, method.label)
                model = run.model if at == "last" else run.at_best()
                judge.measure(row, judge.samples(model), judge.labels)
                i = run.losses.steps.index(step)
                print(
                    f"{method.key:6} {lr:7g}  {at}  {step:4}  {run.losses.selection[i]:9.4f}  "
                    f"{run.losses.heldout[i]:8.4f}  {row.copies:6.3f}  {row.kid:4.2f}  "
                    f"{row.recall:6.3f}  {row.legible:7.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
