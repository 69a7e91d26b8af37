"""The photos of a folder, or of a saved `datasets` folder: which train, and why not the others.

`find` decodes everything once, so that a run does not fail on its last photo, and leaves out by
name what cannot be used. A photo that is there twice is left out too: once in training and once
in the held-out set it would make the held-out loss lie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from .errors import TrainingError
from .images import Unusable, decode
from .sources import SUFFIXES, Entry, Label, Listing, Source, read_folder

_NAMED = 5  # so many names in a message


@dataclass(frozen=True)
class Photo:
    """A photo that can be trained on.

    name: its path in the folder, or "row 12" of a dataset. caption: "" where the model takes
    none. label: the index of its class, where the model has classes. size: (width, height),
    upright. notes: what was changed to use it. digest: SHA-256 of the file, for keys of caches.
    """

    name: str
    caption: str
    label: int | None
    size: tuple[int, int]
    notes: tuple[str, ...]
    digest: str
    source: Source = field(repr=False, compare=False)
    channels: int = field(repr=False, compare=False)

    def open(self) -> Image.Image:
        """Its pixels: upright, "RGB" or, of one channel, "L"."""
        try:
            blob = self.source.read()
        except OSError as error:
            raise TrainingError(f"{self.name}: cannot be read any more ({error})") from error
        if hashlib.sha256(blob).hexdigest() != self.digest:
            raise TrainingError(
                f"{self.name}: the file has changed since the photos were read; start again"
            )
        return decode(blob, self.channels)[0]


@dataclass(frozen=True)
class Photos:
    """items: what to train on, by name. skipped: what was left out, and why. classes: names."""

    items: tuple[Photo, ...]
    skipped: dict[str, str]
    classes: tuple[str, ...]


def find(
    folder: str | Path,
    *,
    resolution: int,
    min_side: int | None = None,
    captions: bool,
    trigger: str = "",
    labels: int | None = None,
    channels: int = 3,
) -> Photos:
    """The photos of `folder`, checked; `sources` says where captions and classes come from.

    Args:
        resolution: that of training; photos below it are noted.
        min_side: photos with a shorter side below it are left out; None: half the resolution.
        captions: whether the model takes any. Then every photo needs one.
        trigger: the caption where there is none; put in front of those that do not have it.
        labels: how many classes the model has. Then every photo needs one. Classes that are all
            whole numbers are the model's indices; names are numbered in their order.
        channels: 3, or 1 for gray images.
    """
    folder = Path(folder)
    if channels not in (1, 3):
        raise TrainingError(f"photos have 1 or 3 channels, the model wants {channels}")
    listing = read_folder(folder, captions, labels is not None)
    least = max(1, resolution // 2 if min_side is None else min_side)
    numbers, classes = _number_classes(folder, listing, labels)
    items: list[Photo] = []
    skipped = dict(listing.skipped)
    seen: dict[str, str] = {}
    for entry in listing.entries:
        try:
            photo, pixels = _read(entry, least, resolution, channels)
            if pixels in seen:
                raise Unusable(f"the same as {seen[pixels]}")
        except Unusable as reason:
            skipped[entry.name] = str(reason)
            continue
        seen[pixels] = entry.name
        caption = _with_trigger(entry.caption, trigger.strip()) if captions else ""
        label = None if entry.label is None else numbers[entry.label]
        items.append(replace(photo, caption=caption, label=label))
    _check_found(folder, items, skipped)
    if captions:
        bare = [photo.name for photo in items if not photo.caption]
        _refuse_bare(folder, bare, "caption", listing.caption_hint)
    if labels is not None:
        bare = [photo.name for photo in items if photo.label is None]
        _refuse_bare(folder, bare, "class", listing.label_hint)
    return Photos(tuple(items), skipped, classes)


def _read(entry: Entry, least: int, resolution: int, channels: int) -> tuple[Photo, str]:
    """The photo without caption and label, and a digest of its pixels."""
    try:
        blob = entry.source.read()
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from error
    image, notes = decode(blob, channels)
    width, height = image.size
    if min(image.size) < least:
        raise Unusable(f"{width}x{height}: expected a shorter side of at least {least} (min_side)")
    # in a bucket a long photo is enlarged less
    if (factor := resolution / min(image.size)) >= 1.05:
        notes = (*notes, f"enlarged up to {factor:.1f}x")
    pixels = hashlib.sha256(f"{width}x{height} ".encode() + image.tobytes()).hexdigest()
    digest = hashlib.sha256(blob).hexdigest()
    return Photo(entry.name, "", None, image.size, notes, digest, entry.source, channels), pixels


def _with_trigger(caption: str, trigger: str) -> str:
    whole_word = rf"(?<!\w){re.escape(trigger)}(?!\w)"
    if caption and trigger and not re.search(whole_word, caption, re.IGNORECASE):
        return f"{trigger}, {caption}"
    return caption or trigger


def _number_classes(
    folder: Path, listing: Listing, count: int | None
) -> tuple[dict[Label, int], tuple[str, ...]]:
    """The index of each label, and the classes' names by index."""
    if count is None:
        return {}, ()
    # those of images that are left out too: a photo that is mended must not move the others
    found = list(dict.fromkeys(e.label for e in listing.entries if e.label is not None))
    names = sorted(label for label in found if isinstance(label, str))
    whole = [label for label in found if isinstance(label, int) or re.fullmatch("[0-9]+", label)]
    if len(whole) == len(found):
        numbers: dict[Label, int] = {label: int(label) for label in whole}
        classes = listing.classes or tuple(map(str, range(count)))
        wrong = [label for label, number in numbers.items() if not 0 <= number < len(classes)]
        if wrong:
            raise TrainingError(
                f"photos: {folder}: expected classes of 0 to {len(classes) - 1}, got {wrong[0]}"
            )
    elif len(names) == len(found):
        numbers, classes = {name: i for i, name in enumerate(names)}, tuple(names)
    else:
        raise TrainingError(
            f"photos: {folder}: expected classes that are all names or all indices, "
            f"got {_some([str(label) for label in found])}"
        )
    if len(classes) > count:
        raise TrainingError(
            f"photos: {folder}: {len(classes)} classes ({_some(classes)}); the model has {count}"
        )
    return numbers, classes


def _check_found(folder: Path, items: Sequence[Photo], skipped: dict[str, str]) -> None:
    if items:
        return
    if not skipped:
        raise TrainingError(
            f"photos: {folder} has no images; expected files of {', '.join(SUFFIXES)}"
        )
    reasons = [f"{name}: {reason}" for name, reason in skipped.items()]
    more = [f"and {len(reasons) - _NAMED} more"] if len(reasons) > _NAMED else []
    lines = "\n  ".join([*reasons[:_NAMED], *more])
    raise TrainingError(f"photos: no image of {folder} can be used:\n  {lines}")


def _refuse_bare(folder: Path, names: Sequence[str], what: str, hint: str) -> None:
    if names:
        raise TrainingError(f"photos: {folder}: no {what} for {_some(names)}: {hint}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
