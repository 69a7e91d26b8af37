"""The files that a run writes as it goes: a line of JSON per event, each with its step.

A line is written whole or not at all as far as a reader is concerned: what a killed process
left half-written has no line end, and is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..adapter_file import replace
from .errors import TrainingError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LOG, EVALUATIONS, SAMPLES = "log.jsonl", "evaluations.jsonl", "samples.jsonl"
# a file's name that is no UTF-8 comes as lone surrogates, and goes as JSON's escapes of them
_TEXT: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}


def append(run: Path, name: str, entry: dict[str, Any]) -> None:
    with explained(run), open(run / name, "a", **_TEXT) as stream:
        stream.write(json.dumps(_finite(entry), ensure_ascii=False) + "\n")


def sync(run: Path) -> None:
    """Makes what was appended durable."""
    for name in (LOG, EVALUATIONS, SAMPLES):
        if (run / name).exists():
            with explained(run), open(run / name, "rb") as stream:
                os.fsync(stream.fileno())


def read(run: Path, name: str, strict: bool = True) -> list[dict[str, Any]]:
    """The entries in order; [] where there is no file. A damaged line raises TrainingError, or
    where it need not be strict ends them."""
    path = run / name
    if not path.exists():
        return []
    *lines, _half = path.read_text(encoding="utf-8", errors="replace").split("\n")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            int(entry["step"])
            found.append(entry)
        except (ValueError, TypeError, KeyError) as error:
            if not strict:
                break
            raise TrainingError(f"{path}: line {number} is damaged: {error!r}") from error
    return found


def cut(run: Path, step: int) -> None:
    """Drops what was recorded after `step`: a run that goes on from there records it again."""
    for name in (LOG, EVALUATIONS, SAMPLES):
        path = run / name
        if path.exists():
            kept = [json.dumps(e, ensure_ascii=False) for e in read(run, name) if e["step"] <= step]
            write(path, "".join(f"{line}\n" for line in kept))


def write(path: Path, content: str | bytes) -> None:
    """The file as a whole, or as it was."""
    data = content.encode(**_TEXT) if isinstance(content, str) else content
    with explained(path.parent):
        replace({path: data})


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(_finite(value), ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """A full disk and its kin as a TrainingError."""
    try:
        yield
    except OSError as error:
        if error.errno is None or isinstance(error, ConnectionError):  # a tracker's network
            raise
        told = f"{folder} cannot be written: {error.strerror or error}"
        if error.errno in FULL:
            told += ". What was saved before is whole; make room, then go on with --resume"
        raise TrainingError(told) from error


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
