"""One run of the demo: train every method, measure, and write the results."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import AdapterConfig, inject, save_adapter, trainable_parameters
from ...backends import resolve
from . import base, data, metrics, picture, report, training
from .report import Row, Shown

# by the rule of scripts/tune_demo.py, on another split of the digits (seed 1)
LEARNING_RATES = {"a3fta": 3e-3, "full": 1e-4, "lora": 1e-3}
LORA_RANK = 16


_ROWS = {
    "base": "base model",
    "a3fta": "A3FTA",
    "full-best": "full tuning, best step",
    "full-last": "full tuning, last step",
    "lora": f"PEFT LoRA r{LORA_RANK}",
    "real": "real unseen digits",
}


@dataclass(frozen=True)
class Options:
    output: Path
    steps: int
    rank: int
    seed: int
    backend: str
    threads: int
    samples: int
    sampling_steps: int
    eval_every: int


def methods(rank: int, backend: str) -> list[training.Method]:
    """What the demo compares, in the order in which it runs."""

    def a3fta(model: nn.Module) -> list[nn.Parameter]:
        inject(model, AdapterConfig(rank=rank), backend=backend)
        return list(trainable_parameters(model))

    return [
        training.Method("a3fta", "A3FTA", LEARNING_RATES["a3fta"], a3fta),
        training.Method("full", "full tuning", LEARNING_RATES["full"], training.full_tuning),
        training.Method(
            "lora", f"PEFT LoRA r{LORA_RANK}", LEARNING_RATES["lora"], training.lora(LORA_RANK)
        ),
    ]


class Judge:
    """Draws the same samples from every model and measures them against the same real digits."""

    def __init__(
        self, digits: data.DemoData, start: base.Base, seed: int, samples: int, steps: int
    ) -> None:
        """`samples` is rounded up to as many of each digit; `steps` are those of the sampler."""
        self.digits, self.start, self.seed, self.steps = digits, start, seed, steps
        self.labels = torch.arange(data.CLASSES).repeat(-(-samples // data.CLASSES))
        self.threshold = metrics.copy_threshold(digits.reference.x, digits.train.x)

    def samples(self, model: nn.Module) -> Tensor:
        return base.sample(model, self.start.sampler(), self.labels, self.seed, self.steps)

    def measure(self, row: Row, samples: Tensor, labels: Tensor) -> None:
        real = self.digits.reference
        row.copies = float(
            metrics.copies(samples, self.digits.train.x, self.threshold).double().mean()
        )
        row.kid = metrics.kid(samples, real.x)
        row.recall = metrics.recall(samples, real.x)
        row.legible = metrics.legible(samples, labels, real.x, real.y)

    def show(self, samples: Tensor, count: int) -> Shown:
        train = self.digits.train.x
        distance, index = metrics.nearest(samples[:count], train)
        return Shown(samples[:count], train[index], distance < self.threshold)


def compare(options: Options) -> list[Row]:
    """Runs everything and writes adapter/, demo.png, demo.md and demo.json to options.output."""
    from rich.console import Console

    console = Console()
    began, began_cpu = time.perf_counter(), time.process_time()
    backend = resolve(options.backend, torch.device("cpu"), torch.float32)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    start, digits = base.load(), data.load(options.seed)
    judge = Judge(digits, start, options.seed, options.samples, options.sampling_steps)
    settings = training.Settings(
        steps=options.steps, seed=options.seed, eval_every=options.eval_every
    )
    console.print(
        f"A base that draws printed digits, {len(digits.train)} handwritten ones to learn from, "
        f"{options.steps} steps per method, backend {backend}."
    )
    todo = methods(options.rank, options.backend)
    rows: dict[str, Row] = {key: Row(key, label) for key, label in _ROWS.items()}
    shown: dict[str, Shown] = {}
    losses: dict[str, training.Losses] = {}
    best: dict[str, int] = {}
    with _progress(console, todo, options.steps) as (on_step, sampled):
        before = judge.samples(start.model())
        sampled()
        judge.measure(rows["base"], before, judge.labels)
        for method in todo:
            run = training.fine_tune(
                method, start.model(), digits, start.noise(), settings, on_step(method.key)
            )
            losses[method.key] = run.losses
            saved = _saved_bytes(run.model, digits, start, settings)
            for row, step in _ends(rows, run):
                # full tuning counts twice: stopping early is the rival that costs nothing
                model = run.at_best() if row.key == "full-best" else run.model
                samples = judge.samples(model)
                sampled()
                at, row.step = run.losses.steps.index(step), step
                row.trainable, row.saved_bytes = run.trainable, saved
                row.steps_per_second = run.steps_per_second
                row.train_loss, row.heldout_loss = run.losses.train[at], run.losses.heldout[at]
                judge.measure(row, samples, judge.labels)
                shown[row.key] = judge.show(samples, 20 if row.key == "a3fta" else 10)
            if method.key == "a3fta":
                save_adapter(run.model, options.output / "adapter")
            if method.key == "full":
                best[method.key] = run.best_step
    rows["base"].train_loss = losses["a3fta"].train[0]
    rows["base"].heldout_loss = losses["a3fta"].heldout[0]
    judge.measure(rows["real"], digits.heldout.x, digits.heldout.y)
    table = list(rows.values())
    text = report.caption(table, len(judge.labels), options.seed)
    footnotes = report.notes(
        len(judge.labels), judge.threshold, len(digits.selection), len(digits.heldout)
    )
    picture.draw(
        options.output / "demo.png", _by_row(digits.train), before[:20], shown, table, losses,
        {m.key: m.label for m in todo}, best, text,
    )  # fmt: skip
    facts = {
        "seed": options.seed,
        "steps": options.steps,
        "rank": options.rank,
        "batch size": settings.batch_size,
        "learning rates": ", ".join(f"{m.label} {m.lr:g}" for m in todo),
        "samples": len(judge.labels),
        "backend": backend,
        "machine": platform.machine(),
        "threads": options.threads,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - began),
        "cpu seconds": round(time.process_time() - began_cpu),
    }
    report.write(
        options.output, table, text, footnotes, facts, {k: vars(v) for k, v in losses.items()}
    )
    report.print_table(console, table, "From printed to handwritten digits")
    console.print(text)
    console.print(
        f"\nWrote adapter/, demo.png, demo.md and demo.json to {options.output} "
        f"in {facts['seconds']} s."
    )
    return table


def _ends(rows: dict[str, Row], run: training.Run) -> list[tuple[Row, int]]:
    """The rows that a run fills, each with the step that it shows."""
    last = run.losses.steps[-1]
    if run.method.key != "full":
        return [(rows[run.method.key], last)]
    rows["full-best"].label += f" {run.best_step}"
    return [(rows["full-last"], last), (rows["full-best"], run.best_step)]


def _saved_bytes(
    model: nn.Module, digits: data.DemoData, start: base.Base, settings: training.Settings
) -> int:
    noisy, t, labels, _ = next(training.batches(digits.train, start.noise(), settings))
    return metrics.saved_for_backward(model.train(), noisy, t, class_labels=labels)


def _by_row(digits: data.Digits) -> Tensor:
    """Images sorted by class, as rows that each hold the ten digits."""
    return digits.x.unflatten(0, (data.CLASSES, -1)).transpose(0, 1).flatten(0, 1)


@contextmanager
def _progress(
    console: Any, todo: list[training.Method], steps: int
) -> Iterator[tuple[Callable[[str], Callable[[int, float], None]], Callable[[], None]]]:
    """A bar per method and one for the sampling: (on_step by method, one sampling done)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks = {m.key: bar.add_task(m.label, total=steps, start=False, note="") for m in todo}
        sampling = bar.add_task("sampling", total=len(todo) + 2, note="")

        def on_step(key: str) -> Callable[[int, float], None]:
            bar.start_task(tasks[key])

            def update(step: int, loss: float) -> None:
                bar.update(tasks[key], completed=step, note=f"loss {loss:.3f}")

            return update

        yield on_step, lambda: bar.advance(sampling)
