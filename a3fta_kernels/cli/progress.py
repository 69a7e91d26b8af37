"""Progress bars of a run: step time, memory, time left, loss."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..memory.account import mib
from ..train.listener import Listener


class Bars(Listener):
    """A bar per run, folds one after the other, and one more for what goes on between steps; only
    in the main process."""

    def __init__(self) -> None:
        self.quiet = int(os.environ.get("RANK", "0")) > 0  # of `accelerate launch`
        self.console = Console(stderr=True, quiet=self.quiet)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task: Any = None
        self.between: tuple[str, Any] | None = None

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.stop()

    def begin(self, title: str, step: int, steps: int) -> None:
        self.task = self.progress.add_task(title, total=steps, completed=step, note="")

    def step(self, entry: dict[str, Any]) -> None:
        note = f"loss {entry['loss']:.4f}  {entry['seconds']:.2f} s/step"
        if entry["memory"] is not None:
            note += f"  {mib(entry['memory'])}"
        self.progress.update(self.task, completed=entry["step"], note=note)

    def work(self, what: str, done: int, of: int) -> None:
        if self.between is not None and self.between[0] != what:  # which was cut off
            self.progress.remove_task(self.between[1])
            self.between = None
        if self.between is None:
            self.between = what, self.progress.add_task(f"  {what}", total=of, note="")
        self.progress.update(self.between[1], completed=done)
        if done == of:
            self.progress.remove_task(self.between[1])
            self.between = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)
