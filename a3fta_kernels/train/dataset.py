"""The photos of a run: found, cut to sizes, split, written down, and encoded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import records
from .buckets import Size, fit, sizes
from .cache import Cache
from .drawing import Prompt
from .encoding import Encoder
from .errors import TrainingError
from .families import Family, Row
from .listener import Listener, Share
from .photos import Photos, find
from .settings import Settings
from .split import Split, split
from .trainer import Material

PHOTOS = "photos.json"
# what a run that goes on must find as it was
_FIXED = ("digest", "caption", "label", "bucket", "split", "fold")


@dataclass
class Data:
    """The photos of a run and everything that was decided about them."""

    photos: Photos
    sizes: list[Size]
    split: Split

    @property
    def train(self) -> tuple[int, ...]:
        held = set(self.split.heldout)
        return tuple(i for i in range(len(self.photos.items)) if i not in held)

    def __str__(self) -> str:
        """What a person should know before it begins."""
        held, folds = len(self.split.heldout), len(self.split.folds)
        said = f"{len(self.photos.items)} photos, {len(set(self.sizes))} sizes to train at"
        if held:
            said += f"; {held} of them are held out"
        elif folds:
            said += f"; {folds} runs without a part of them come before the last, on all"
        else:
            said += "; none is held out, so nothing will tell when it overfits"
        return "\n".join([said, *_remarks(self.photos)])

    def to_dict(self) -> dict[str, Any]:
        fold_of = {i: number for number, fold in enumerate(self.split.folds, 1) for i in fold}
        used = [
            {
                "name": photo.name, "file": str(getattr(photo.source, "path", "")),
                "digest": photo.digest, "caption": photo.caption, "label": photo.label,
                "size": list(photo.size), "bucket": list(size), "fold": fold_of.get(i),
                "notes": list(photo.notes),
                "split": "heldout" if i in self.split.heldout else "train",
            }
            for i, (photo, size) in enumerate(zip(self.photos.items, self.sizes, strict=True))
        ]  # fmt: skip
        skipped = [{"name": n, "reason": why} for n, why in self.photos.skipped.items()]
        return {"used": used, "skipped": skipped, "classes": list(self.photos.classes)}

    def images(self, indices: Sequence[int]) -> list[Image.Image]:
        """As training sees them."""
        return [fit(self.photos.items[i].open(), self.sizes[i])[0] for i in indices]


def _remarks(photos: Photos) -> list[str]:
    """A line per photo that is left out or changed."""
    skipped = [f"  left out: {name}: {why}" for name, why in photos.skipped.items()]
    return skipped + [f"  {p.name}: {', '.join(p.notes)}" for p in photos.items if p.notes]


def gather(settings: Settings, family: Family) -> Data:
    resolution = settings.resolution or family.resolution
    photos = find(
        settings.data, resolution=resolution, min_side=settings.min_side,
        captions=family.captions, trigger=settings.trigger, labels=family.classes,
        channels=family.channels,
    )  # fmt: skip
    cut = sizes((p.size for p in photos.items), resolution, family.multiple, settings.buckets)
    labels = [p.label for p in photos.items] if family.classes else None
    # what nobody evaluates is not held out
    rule = settings.heldout if settings.evaluate_every else "none"
    return Data(
        photos, cut,
        split(
            len(cut), rule, holdout=settings.heldout_count, folds=settings.folds,
            seed=settings.seed, groups=labels,
        ),
    )  # fmt: skip


def keep(output: Path, data: Data, begun: bool) -> None:
    """Writes the photos down; where the run has begun, raises TrainingError if they are others."""
    facts, path = data.to_dict(), output / PHOTOS
    if begun and path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            old, new = (
                {u["name"]: {key: u.get(key) for key in _FIXED} for u in photos["used"]}
                for photos in (before, facts)
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"resume: expected {path} as the run wrote it, got another: {error!r}"
            ) from error
        changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if changed:
            raise TrainingError(
                f"data: expected the photos and captions that the run began with, got others: "
                f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}"
            )
    records.write_json(path, facts)


def encode(
    settings: Settings, family: Family, data: Data, output: Path, listener: Listener
) -> tuple[Material, list[Prompt]]:
    # pixels alone need no encoder
    encoder = Encoder(family, Cache(output / "cache" if family.captions else None))
    photos = data.photos.items
    told = Share(listener, "photos", len(photos) * (1 + settings.flip)).more
    material = Material(
        rows=encoder.rows(photos, data.sizes, told=told),
        mirrored=(
            encoder.rows(photos, data.sizes, mirrored=True, told=told) if settings.flip else ()
        ),
        digests=[p.digest for p in photos],
        names=[p.name for p in photos],
        prior=(
            _prior(settings, family, encoder, listener)
            if settings.prior_weight and settings.prior_data else []
        ),
        empty=encoder.text(""),
        prior_text=encoder.text(settings.prior_prompt) if settings.prior_weight else {},
    )  # fmt: skip
    return material, _prompts(settings, family, encoder, data)


def _prior(settings: Settings, family: Family, encoder: Encoder, listener: Listener) -> list[Row]:
    resolution = settings.resolution or family.resolution
    found = find(
        settings.prior_data, resolution=resolution, min_side=settings.min_side, captions=False,
        labels=family.classes, channels=family.channels,
    )  # fmt: skip
    listener.say("\n".join([f"{len(found.items)} images for the prior", *_remarks(found)]))
    cut = sizes((p.size for p in found.items), resolution, family.multiple, settings.buckets)
    told = Share(listener, "images of the prior", len(cut)).more
    return encoder.rows(found.items, cut, told=told)


def _prompts(settings: Settings, family: Family, encoder: Encoder, data: Data) -> list[Prompt]:
    """What samples show: the settings' prompts, else captions or classes of the photos, in turn."""
    photos, count = [data.photos.items[i] for i in data.train], settings.sample_count
    if family.captions:
        # those that were asked for are drawn all, captions as many as there is room for
        count = max(count, len(settings.sample_prompts))
        texts = list(dict.fromkeys(settings.sample_prompts or (p.caption for p in photos)))
        told = [Prompt(text, encoder.text(text)) for text in texts[:count]]
    elif family.classes:
        labels = sorted({p.label for p in photos if p.label is not None})
        names = dict(enumerate(data.photos.classes))
        told = [
            Prompt(names.get(label, f"class {label}"), {"label": torch.tensor(label)})
            for label in labels
        ]
    else:
        told = [Prompt("", {})]
    return [told[i % len(told)] for i in range(count)]
