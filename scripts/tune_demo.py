"""The search behind the demo's learning rates: every method over the same grid.

    python scripts/tune_demo.py --seed 1

Another seed splits the digits in another way than the demo does by default; both splits are of
the same 1797 digits, so they overlap. Each line gives the loss on the selection digits at the last
step and at the best one, and what the samples of both are worth.

The rule, the same for every method: of the rates whose selection loss at their best step is within
the demo's tie of the lowest, those whose loss at the last step is within it of the lowest; of
these the highest, which adapts most. a3fta_kernels/cli/demo/compare.py holds the choice.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from a3fta_kernels.cli.demo import base, compare, data, training
from a3fta_kernels.cli.demo.report import TIE, Row

GRID = {
    "a3fta": (1e-3, 3e-3, 1e-2),
    "full": (3e-5, 1e-4, 3e-4, 1e-3),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2),
}


def choose(ends: dict[float, tuple[float, float]]) -> float:
    """The learning rate, from the selection losses of each at its best and at its last step."""
    for end in (0, 1):
        limit = min(losses[end] for losses in ends.values()) * (1 + TIE)
        ends = {lr: losses for lr, losses in ends.items() if losses[end] <= limit}
    return max(ends)


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
        if method.key not in args.methods:
            continue
        ends = {}
        for lr in GRID[method.key]:
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
            ends[lr] = (min(run.losses.selection), run.losses.selection[-1])
        print(f"{method.key}: {choose(ends):g}", flush=True)


if __name__ == "__main__":
    main()
