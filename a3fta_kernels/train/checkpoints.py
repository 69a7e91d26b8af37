"""Checkpoints: folders that are there whole or not at all.

A checkpoint is written beside its place, synced, and renamed into it; `state.json` holds the
SHA-256 of every other file. Whatever kills the process, an earlier checkpoint stays.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..adapter_file import sync
from .errors import TrainingError
from .records import explained

logger = logging.getLogger("a3fta_kernels")

STATE = "state.json"
_PLACE = re.compile(r"step-(\d{6,})")
_LEFT = re.compile(r"\..+\.[0-9a-f]{8,16}\.(tmp|gone)|\.adapter\.new")


def place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def save(folder: Path, step: int, fill: Callable[[Path], None]) -> Path:
    """Makes the checkpoint of `step` of what `fill` writes into a folder. TrainingError where
    the disk is full or one of that step is there; nothing else is touched then."""
    target = place(folder, step)
    temporary = folder / f".{target.name}.{secrets.token_hex(4)}.tmp"
    with explained(folder):
        try:
            temporary.mkdir(parents=True)
            fill(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            hashes = {str(path.relative_to(temporary)): _digest(path) for path in files}
            state = {"step": step, "files": hashes}
            (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            for path in [*files, temporary / STATE]:
                sync(path)
            for path in (p for p in temporary.rglob("*") if p.is_dir()):
                sync(path)
            sync(temporary)
            os.rename(temporary, target)  # fails where one of that step is there
            sync(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that are there, the earliest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for path in folder.iterdir() if (m := _PLACE.fullmatch(path.name)))


def latest(folder: Path, most: float = math.inf) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole and of no step beyond `most`, and its state. A damaged
    one is named and passed over; TrainingError where all of them are."""
    damaged = []
    for step in reversed(steps(folder)):
        if step > most:
            continue
        path = place(folder, step)
        try:
            return path, check(path)
        except TrainingError as error:
            logger.warning("%s; trying the one before", error)
            damaged.append(str(error))
    if damaged:
        raise TrainingError(
            f"no checkpoint is whole: {'; '.join(damaged)}. To begin again, remove {folder}"
        )
    return None


def check(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are what was saved; else TrainingError."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if path != place(path.parent, state["step"]):
            raise TrainingError(f"checkpoint {path} is damaged: it is of step {state['step']}")
        for name, digest in state["files"].items():
            if _digest(path / name) != digest:
                raise TrainingError(f"checkpoint {path} is damaged: {name} is not what was saved")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise TrainingError(f"checkpoint {path} is damaged: {reason}") from error
    return state


def prune(folder: Path, limit: int, keep: Iterable[int]) -> None:
    """Removes all but the newest `limit` (0: all stay) and those of the steps in `keep`."""
    kept = set(keep)
    for step in steps(folder)[:-limit] if limit else []:
        if step not in kept:
            _remove(place(folder, step))


def after(folder: Path, step: int) -> None:
    """Removes the checkpoints after `step`."""
    for other in steps(folder):
        if other > step:
            _remove(place(folder, other))


def tidy(run: Path) -> None:
    """Removes what a killed process left half done, anywhere in a run's folder."""
    for path in [path for path in run.rglob(".*") if _LEFT.fullmatch(path.name)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove(path: Path) -> None:
    # a folder that is half removed must not look like a checkpoint
    gone = path.with_name(f".{path.name}.{secrets.token_hex(4)}.gone")
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
