"""What a folder says of its images: where each lies, its caption, its class. No pixels yet.

A folder of image files has captions in `a.txt` beside `a.jpg`, or in a `metadata.jsonl` as of
HF's imagefolder (file_name, text or caption, label); classes there, or as its first subfolders.
A folder by `datasets`' save_to_disk has the columns image, text or caption, label.
"""

from __future__ import annotations

import json
import posixpath
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .errors import TrainingError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# what people have instead, and would wonder about
_OTHERS = (".heic", ".heif", ".avif", ".jxl", ".gif", ".dng", ".cr2", ".cr3", ".nef", ".arw")

Label = int | str | None


class Source(Protocol):
    def read(self) -> bytes:
        """The bytes of an image file. Raises OSError."""


@dataclass(frozen=True)
class File:
    path: Path

    def read(self) -> bytes:
        return self.path.read_bytes()


@dataclass(frozen=True)
class Row:
    """A row of a dataset whose column image is not decoded."""

    dataset: Any = field(repr=False)
    index: int

    def read(self) -> bytes:
        image = self.dataset[self.index]["image"]
        if image is None:
            raise OSError("the row has no image")
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


@dataclass(frozen=True)
class Entry:
    """An image before it is read. caption: "" if there is none."""

    name: str
    source: Source
    caption: str = ""
    label: Label = None


@dataclass(frozen=True)
class Listing:
    """skipped: names of files that are no images for us, with the reason. classes: their names
    by index, if the folder gives an order; hint: how to give an image a caption, and a class."""

    entries: list[Entry]
    skipped: dict[str, str]
    classes: tuple[str, ...]
    caption_hint: str
    label_hint: str


def read_folder(folder: Path, captions: bool, labels: bool) -> Listing:
    """The images of `folder`, sorted by name; captions and labels only where they are wanted."""
    if not folder.exists():
        raise TrainingError(f"photos: there is no folder {folder}")
    if not folder.is_dir():
        raise TrainingError(f"photos: expected a folder, got the file {folder}")
    names = ("dataset_info.json", "state.json")
    if (folder / "dataset_dict.json").is_file() or all((folder / x).is_file() for x in names):
        return _dataset(folder, captions, labels)
    return _files(folder, captions, labels)


def _files(folder: Path, captions: bool, labels: bool) -> Listing:
    everything = {_shown(path.relative_to(folder)): path for path in _walk(folder)}
    images = {k: p for k, p in sorted(everything.items()) if p.suffix.lower() in SUFFIXES}
    skipped = {
        name: f"{path.suffix} files are not read: convert it to PNG or JPEG"
        for name, path in sorted(everything.items())
        if path.suffix.lower() in _OTHERS
    }
    metadata: dict[str, dict[str, Any]] = {}
    if captions or labels:
        known = {unicodedata.normalize("NFC", name) for name in (*images, *skipped)}
        for name, path in sorted(everything.items()):
            if path.name == "metadata.jsonl":
                metadata.update(_metadata(path, posixpath.dirname(name), known, metadata))
    entries = []
    for name, path in images.items():
        row = metadata.get(unicodedata.normalize("NFC", name), {})
        caption = (_text_file(path.with_suffix(".txt")) or row.get("text", "")) if captions else ""
        subfolder = name.split("/")[0] if "/" in name else None
        label = row.get("label", subfolder) if labels else None
        entries.append(Entry(name, File(path), caption, label))
    first = next(iter(images), "a.jpg")
    return Listing(
        entries,
        skipped,
        (),
        f"write {posixpath.splitext(first)[0]}.txt and so on, add them to metadata.jsonl, "
        "or give --trigger",
        "put each into a subfolder named after its class, or add a label to metadata.jsonl",
    )


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files but hidden ones; links are followed, once around."""
    real = folder.resolve()
    if real in above:
        return
    try:
        children = sorted(folder.iterdir())
    except OSError as error:
        raise TrainingError(f"photos: {folder} cannot be read ({error.strerror})") from error
    for child in children:
        if child.name.startswith("."):
            continue
        if child.is_dir():
            yield from _walk(child, (*above, real))
        else:
            yield child


def _shown(path: Path) -> str:
    """The path as text that can be written everywhere, whatever bytes the file system has."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()


def _clean(text: str) -> str:
    return " ".join(text.split())


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path}: expected text in UTF-8, found {error}") from error
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror})") from error


def _text_file(path: Path) -> str:
    return _clean(_read_text(path)) if path.exists() else ""


def _metadata(
    path: Path, folder: str, known: set[str], before: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The text and label of each image that the file lists, by the image's name."""
    rows: dict[str, dict[str, Any]] = {}
    # not splitlines: a caption may hold the line separators of Unicode
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingError(f"{path}, line {number}: expected JSON, {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise TrainingError(
                f'{path}, line {number}: expected {{"file_name": ..., "text": ...}}, '
                f"got {line.strip()[:80]}"
            )
        listed = posixpath.normpath(posixpath.join(folder, row["file_name"]))
        name = unicodedata.normalize("NFC", listed)
        if name not in known:
            raise TrainingError(f"{path}, line {number}: there is no image {row['file_name']!r}")
        if name in rows or name in before:
            raise TrainingError(f"{path}, line {number}: {row['file_name']!r} is listed twice")
        rows[name] = _checked_row(row, f"{path}, line {number}")
    return rows


def _checked_row(row: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    text = row.get("text", row.get("caption"))
    label = row.get("label")
    if text is not None:
        if not isinstance(text, str):
            raise TrainingError(f"{where}: expected the caption as text, got {text!r}")
        found["text"] = _clean(text)
    if label is not None:
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise TrainingError(f"{where}: expected a class or its index as label, got {label!r}")
        found["label"] = label
    return found


def _dataset(folder: Path, captions: bool, labels: bool) -> Listing:
    try:
        import datasets
    except ImportError as error:
        raise TrainingError(
            f"photos: {folder} is a datasets folder; to read it, pip install datasets"
        ) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise TrainingError(f"photos: {folder}: a damaged datasets folder ({error})") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise TrainingError(f"photos: {folder}: expected a split train, found {_list(loaded)}")
        loaded = loaded["train"]
    features = loaded.features

    def refuse(expected: str) -> TrainingError:
        found = _list(f"{name} ({kind})" for name, kind in features.items())
        return TrainingError(f"photos: {folder}: expected {expected}, found the columns {found}")

    if not isinstance(features.get("image"), datasets.Image):
        raise refuse("a column image, of images")
    rows = loaded.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    texts: list[str | None] = [None] * len(rows)
    classes: list[Label] = [None] * len(rows)
    names: tuple[str, ...] = ()
    column = next((name for name in ("text", "caption") if name in features), None)
    if captions and column:
        if getattr(features[column], "dtype", None) not in ("string", "large_string"):
            raise refuse(f"text in the column {column}")
        texts = list(loaded[column])
    if labels:
        kind = features.get("label")
        if not getattr(kind, "dtype", "").startswith(("int", "uint", "string", "large_string")):
            raise refuse("a column label, of classes or their indices")
        classes = list(loaded["label"])
        names = tuple(getattr(kind, "names", ()))
    entries = [
        Entry(f"row {i}", Row(rows, i), _clean(text or ""), label)
        for i, (text, label) in enumerate(zip(texts, classes, strict=True))
    ]
    return Listing(
        entries,
        {},
        names,
        "fill the column text or caption, or give --trigger",
        "fill the column label",
    )


def _list(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"
