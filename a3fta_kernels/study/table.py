"""A results file: a CSV of one line per finished run, whose lines are of one plan.

A line is written as a whole, after its run, and forced to the disk. What a cut-off write left of
a line is dropped at the next start, so that nothing finished is lost and nothing half counts.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.errors import TrainingError

Line = dict[str, str]


class Table:
    """columns: the first must be "plan". key: those that tell one run from another."""

    def __init__(self, path: Path, columns: Sequence[str], key: Sequence[str], plan: str) -> None:
        self.path, self.columns, self.key, self.plan = path, tuple(columns), tuple(key), plan

    def read(self) -> list[Line]:
        """The finished runs. Raises TrainingError for a file of other columns or another plan."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TrainingError(f"{self.path}: expected text in UTF-8: {error}") from error
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            return []
        head, *lines = csv.reader(io.StringIO(whole))
        if tuple(head) != self.columns:
            raise TrainingError(
                f"{self.path}: expected the columns {', '.join(self.columns)}, got "
                f"{', '.join(head)}; it is of another version, so move it away"
            )
        found = []
        for number, values in enumerate(lines, 2):
            if len(values) != len(head):
                raise TrainingError(
                    f"{self.path}: line {number}: expected {len(head)} values, got {len(values)}"
                )
            line = dict(zip(head, values, strict=True))
            if line["plan"] != self.plan:
                raise TrainingError(
                    f"{self.path}: line {number} is of plan {line['plan']}, this is plan "
                    f"{self.plan}; give another --folder, or take back what changed"
                )
            found.append(line)
        names = [self.name(line) for line in found]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TrainingError(f"{self.path}: there twice: {sorted(twice)[0]}")
        return found

    def name(self, line: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(shown(line[column]) for column in self.key)

    def mend(self) -> None:
        """Drops what a cut-off write left of a line."""
        if self.path.exists():
            data = self.path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                os.truncate(self.path, end)

    def append(self, line: Mapping[str, Any]) -> None:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            writer.writerow(self.columns)
        values = {**line, "plan": self.plan}
        writer.writerow([shown(values[column]) for column in self.columns])
        with open(self.path, "a", encoding="utf-8", newline="") as stream:
            stream.write(buffer.getvalue())
            stream.flush()
            os.fsync(stream.fileno())


def shown(value: Any) -> str:
    """A cell; lists are separated by blanks."""
    if isinstance(value, list | tuple):
        return " ".join(shown(item) for item in value)
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def numbers(cell: str) -> list[float]:
    return [float(item) for item in cell.split()]


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """The folder, for this study alone; a killed one gives it back."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"folder: {folder} is in use by another study") from None
        yield
