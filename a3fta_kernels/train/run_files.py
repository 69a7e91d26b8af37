"""A run folder, read for people: what the figures, the report and the model card are made from.

A run may have crashed at any step: files may be missing, and the last line of one may be cut off.
What is there is read; what is not is empty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps

from . import records

Row = dict[str, Any]


def read_object(path: Path) -> Row:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


@dataclass(frozen=True)
class Curve:
    """A mean loss over steps, of one fold or of all photos (fold None). Never empty."""

    fold: int | None
    steps: list[int]
    values: list[float]

    def at(self, step: int) -> float | None:
        return self.values[self.steps.index(step)] if step in self.steps else None

    def best(self) -> int:
        """The step of the lowest value, the earliest of equals."""
        return min(zip(self.values, self.steps, strict=True))[1]


@dataclass(frozen=True)
class Run:
    """The files of a run folder; each is read when first asked for."""

    folder: Path

    def _lines(self, name: str) -> list[Row]:
        return records.read(self.folder, name, strict=False)

    @cached_property
    def settings(self) -> Row:
        try:
            found = yaml.safe_load((self.folder / "settings.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def summary(self) -> Row:
        return read_object(self.folder / "summary.json")

    @cached_property
    def photos(self) -> Row:
        return {"used": [], "skipped": [], **read_object(self.folder / "photos.json")}

    @cached_property
    def log(self) -> list[Row]:
        return self._lines(records.LOG)

    @cached_property
    def evaluations(self) -> list[Row]:
        return self._lines(records.EVALUATIONS)

    @cached_property
    def samples(self) -> list[Row]:
        return [row for row in self._lines(records.SAMPLES) if row.get("files")]

    @cached_property
    def fold_rows(self) -> dict[int, list[Row]]:
        """Fold -> its evaluations."""
        files = {
            int(file.parent.name): file
            for file in self.folder.glob("folds/*/evaluations.jsonl")
            if file.parent.name.isdigit()
        }
        found = {
            fold: records.read(file.parent, file.name, strict=False)
            for fold, file in sorted(files.items())
        }
        return {fold: rows for fold, rows in found.items() if rows}

    @cached_property
    def folds(self) -> list[Curve]:
        """The held-out curve of each fold, from the summary or, before there is one, the folds;
        without the steps where it diverged."""
        told = {
            x["fold"]: [
                {"step": step, "heldout_mean": loss}
                for step, loss in zip(x["steps"], x["heldout_mean"], strict=True)
            ]
            for x in self.summary.get("fold_curves") or []
        }
        by_fold = told or self.fold_rows
        curves = [_curve(rows, "heldout_mean", fold) for fold, rows in by_fold.items()]
        return [curve for curve in curves if curve]

    @cached_property
    def heldout(self) -> Curve | None:
        """The curve that tells when it overfits: of the photos held out, or the mean of folds,
        each by its photos, at the steps that all of them reached."""
        if (curve := self.mean_of("heldout_mean")) or not self.folds:
            return curve
        tables = [dict(zip(curve.steps, curve.values, strict=True)) for curve in self.folds]
        steps = sorted(set.intersection(*map(set, tables)))
        sizes = [self.fold_size(curve.fold) for curve in self.folds]
        values = [_weighted([table[step] for table in tables], sizes) for step in steps]
        return Curve(None, steps, values) if steps else None

    @cached_property
    def binned(self) -> list[Row]:
        """Losses per range of noise levels, with `bins`, `train` and `heldout`, where something
        was held out; of folds the mean, at the steps that all of them reached."""
        if rows := _binned(self.evaluations):
            return rows
        tables = [{row["step"]: row for row in _binned(rows)} for rows in self.fold_rows.values()]
        if not tables:
            return []
        sizes = [self.fold_size(fold) for fold in self.fold_rows]
        found = []
        for step in sorted(set.intersection(*map(set, tables))):
            rows = [table[step] for table in tables]
            parts = {
                part: [
                    _weighted(column, sizes)
                    for column in zip(*(x[part] for x in rows), strict=True)
                ]
                for part in ("train", "heldout")
            }
            found.append({"step": step, "bins": rows[0]["bins"], **parts})
        return found

    def fold_size(self, fold: int | None) -> int:
        return max(sum(photo.get("fold") == fold for photo in self.photos["used"]), 1)

    def mean_of(self, name: str) -> Curve | None:
        """`train_mean` or `heldout_mean` over steps; None where nothing was measured."""
        return _curve(self.evaluations, name, None)

    @property
    def chosen(self) -> int | None:
        return self.summary.get("chosen_step")

    @property
    def judged(self) -> int | None:
        """The step at which the held-out loss speaks for the chosen one: of folds, which see
        their photos more often, an earlier one."""
        if self.settings.get("choose") == "last":
            return self.chosen
        return self.summary.get("folds_best") or self.chosen

    @property
    def last_step(self) -> int:
        """The last step that any file knows of."""
        rows = (self.log, self.evaluations, self.samples)
        return max([part[-1]["step"] for part in rows if part] + [self.chosen or 0])

    @property
    def span(self) -> int:
        """The last step that was tried, by this run or by one of its folds."""
        return max([self.last_step, *(curve.steps[-1] for curve in self.folds)])

    def sample_row(self) -> Row | None:
        """The samples of the chosen step, or the last before it, or the first after it; without a
        choice the last."""
        if not self.samples:
            return None
        if self.chosen is None:
            return self.samples[-1]
        before = [row for row in self.samples if row["step"] <= self.chosen]
        return before[-1] if before else self.samples[0]

    def photo(self, name: str) -> Row | None:
        return next((row for row in self.photos["used"] if row.get("name") == name), None)


def _curve(rows: list[Row], name: str, fold: int | None) -> Curve | None:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return Curve(fold, [step for step, _ in found], [x for _, x in found]) if found else None


def _binned(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.get("bins") and row.get("heldout") and row.get("train")]


def _weighted(values: Sequence[float | None], sizes: Sequence[int]) -> float:
    """The mean by size; NaN where one is missing: JSON has null for it."""
    pairs = zip(sizes, values, strict=True)
    return sum(n * (math.nan if x is None else x) for n, x in pairs) / sum(sizes)


def prompts(row: Row) -> list[str]:
    """One text per file of a line of samples.jsonl; "" where a sample has none."""
    given = list(row.get("prompts") or [])
    count = len(row["files"])
    return [("" if p is None else str(p)) for p in (given + [""] * count)[:count]]


def is_copy(row: Row, i: int) -> bool:
    """Whether the i-th sample of a line of samples.jsonl is a near-copy."""
    distance, threshold = distance_of(row, i), row.get("threshold")
    if row.get("copies") is None or distance is None or threshold is None:
        return False
    return bool(distance < threshold)


def distance_of(row: Row, i: int) -> float | None:
    found = row.get("distance") or []
    return found[i] if i < len(found) else None


def nearest_of(row: Row, i: int) -> str | None:
    found = row.get("nearest") or []
    return found[i] if i < len(found) else None


def told(value: Any) -> str:
    """A setting in words."""
    if value is None or value == "" or value == []:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def thumbnail(path: Path | None, side: int) -> Image.Image | None:
    """The picture at most `side` pixels wide and high; None where it cannot be read any more."""
    if path is None:
        return None
    try:
        with Image.open(path) as image:
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is read at a fraction
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    upright.thumbnail((side, side), Image.Resampling.LANCZOS)
    return upright
