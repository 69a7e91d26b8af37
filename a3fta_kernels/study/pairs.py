"""The pairs of source and target that need no download.

digits: printed digits, then handwritten ones (scikit-learn, 8 x 8); digits-2: the same from another
base. A script by its name: Latin letters, then letters of that script, never seen (16 x 16); with
-32 behind it: the same at 32 x 32, for a GPU.
digits-search: digits for choosing a design, on images that no run of digits trains on, stops by or
is judged by.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_choice
from ..train.batches import generator
from ..train.families.family import to_images
from ..train.families.unconditional import Unconditional
from . import bases, features, glyphs
from .plan import SEARCH
from .subject import Subject, dealt

# images per class of each part, the rest is the pool; "features" teach the feature network
_DIGITS = {"features": 50, "reference": 50, "heldout": 10, "tuning": 10, "tuning_heldout": 15}
_LETTER_PARTS = {
    "features": 500, "reference": 500, "heldout": 100, "tuning": 100, "tuning_heldout": 150,
    "pool": 400,
}  # fmt: skip
_SOURCE = 50  # images for forgetting


@dataclass(frozen=True)
class Pair:
    """source, target: names in glyphs.SCRIPTS, or target "handwritten". channels: of the base's
    levels. steps, batch, rate, seed: of its pre-training; pairs of one source, side and seed share
    the base."""

    source: str
    target: str
    frame: glyphs.Frame
    channels: tuple[int, ...]
    conditional: bool
    steps: int = 6000
    batch: int = 64
    rate: float = 2e-3
    seed: int = 0


_DIGIT, _LETTER = glyphs.Frame(8, 4, 96, 64), glyphs.Frame(16, 4, 192, 128)
_LARGE = glyphs.Frame(32, 4, 192, 128)
_UNSEEN = [script for script in glyphs.SCRIPTS if script not in ("digits", "latin")]
PAIRS = {
    "digits": Pair("digits", "handwritten", _DIGIT, (32, 48), True),
    f"digits{SEARCH}": Pair("digits", "handwritten", _DIGIT, (32, 48), True),
    "digits-2": Pair("digits", "handwritten", _DIGIT, (48, 64), True, seed=1),
    **{script: Pair("latin", script, _LETTER, (32, 48, 64), False) for script in _UNSEEN},
    **{
        f"{script}-32": Pair("latin", script, _LARGE, (32, 48, 64, 64), False) for script in _UNSEEN
    },
}


def load(name: str, folder: Path, device: str = "cpu") -> Subject:
    """The pair of that name, with models on `device`. Its base, there, and its feature network, by
    the CPU, are made in `folder` where they are not there yet."""
    check_choice("pair", name, PAIRS)
    pair = PAIRS[name]
    again = f"-{pair.seed}" if pair.seed else ""
    base = _base(
        pair, folder / "bases" / f"{pair.source}-{pair.frame.side}{again}.safetensors", device
    )
    x, labels, parts = _handwritten() if pair.target == "handwritten" else _letters(pair)
    images = to_images(x)
    learned = list(parts.pop("features"))
    network = _network(
        pair,
        [images[i] for i in learned],
        labels[learned],
        folder / "features" / f"{name.removesuffix(SEARCH)}.safetensors",
    )
    pristine = base.pipeline().to(device)

    def fresh() -> Unconditional:
        # built once: a copy is cheaper than a model
        return Unconditional(copy.deepcopy(pristine))

    side = pair.frame.side
    return Subject(
        name=name,
        fresh=fresh,
        rows=_rows(x, labels if pair.conditional else None),
        digests=[f"{name} {i}" for i in range(len(x))],
        images=images,
        # of more letters than images no share can be kept
        labels=labels.tolist() if pair.conditional else None,
        parts=_turned(parts) if name.endswith(SEARCH) else parts,
        extractors={"network": network.extract, "pixels": features.pixels},
        size=(side, side),
        source=_source(pair),
    )


def _rows(x: Tensor, labels: Tensor | None) -> list[dict[str, Tensor]]:
    if labels is None:
        return [{"mean": image} for image in x]
    return [{"mean": image, "label": label} for image, label in zip(x, labels, strict=True)]


def _base(pair: Pair, path: Path, device: str) -> bases.Base:
    if not path.exists():
        print(f"{path}: pre-training on {pair.source}", flush=True)
        soft, labels = _soft(pair)
        classes = len(glyphs.SCRIPTS[pair.source].characters) if pair.conditional else None
        unet = bases.architecture(pair.frame.side, pair.channels, classes)
        model = bases.pretrain(
            unet, bases.SCHEDULE,
            lambda draw: glyphs.batch(soft, labels, pair.batch, pair.frame, draw),
            pair.steps, pair.rate, pair.seed, device=device,
        )  # fmt: skip
        facts = {"steps": pair.steps, "batch_size": pair.batch, "lr": pair.rate, "seed": pair.seed}
        bases.save(model, path, unet, bases.SCHEDULE, facts)
    return bases.load(path)


def _network(pair: Pair, images: Sequence[Any], labels: Tensor, path: Path) -> features.Network:
    if not path.exists():
        features.save(features.learn(images, labels, seed=0), path)
    return features.load(path, pair.frame.side, int(labels.max()) + 1)


def _source(pair: Pair) -> list[dict[str, Tensor]]:
    soft, labels = _soft(pair)
    x, y = glyphs.batch(soft, labels, _SOURCE, pair.frame, generator("study", "source"))
    return _rows(x, y if pair.conditional else None)


def _soft(pair: Pair) -> tuple[Tensor, Tensor]:
    """The source's glyphs, ready to be varied, and their characters."""
    drawn, labels = glyphs.render(glyphs.SCRIPTS[pair.source], pair.frame)
    return glyphs.soften(drawn, pair.frame), labels


def _handwritten() -> tuple[Tensor, Tensor, dict[str, tuple[int, ...]]]:
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float().div(8).sub(1)[:, None]
    labels = torch.from_numpy(raw.target).long()
    return x, labels, _deal(labels, _DIGITS)


def _deal(labels: Tensor, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Indices per part, so many of each class; the rest is "pool"."""
    parts: dict[str, list[int]] = {name: [] for name in (*sizes, "pool")}
    draw = generator("study", "parts")
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        mixed = mine[torch.randperm(len(mine), generator=draw)].tolist()
        for name, size in sizes.items():
            parts[name] += mixed[:size]
            mixed = mixed[size:]
        parts["pool"] += mixed
    return {name: tuple(sorted(part)) for name, part in parts.items()}


def _turned(parts: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """For a search: its runs train on images of the trials, and the pool is its reference."""
    one, other = (slice(i, None, 2) for i in (0, 1))
    return {
        "pool": parts["tuning"][one],
        "heldout": parts["tuning_heldout"][one],
        "tuning": parts["tuning"][other],
        "tuning_heldout": parts["tuning_heldout"][other],
        "reference": parts["pool"],
    }


def _letters(pair: Pair) -> tuple[Tensor, Tensor, dict[str, tuple[int, ...]]]:
    """Every shape (a letter in a font) is in one part alone, and is varied there."""
    drawn, letters = _unseen(pair)
    soft = glyphs.soften(drawn, pair.frame)
    draw = generator("study", "letters", pair.target)
    x, labels, parts = [], [], {}
    begin = 0
    for name, shapes in _shares(letters).items():
        # a part has more images than shapes: a shape comes again, varied in another way
        again = shapes[torch.arange(_LETTER_PARTS[name]) % len(shapes)]
        x.append(glyphs.vary(soft[again], pair.frame, draw))
        labels.append(letters[again])
        parts[name] = tuple(range(begin, begin + len(again)))
        begin += len(again)
    return torch.cat(x), torch.cat(labels), parts


def _unseen(pair: Pair) -> tuple[Tensor, Tensor]:
    """The target's glyphs and letters, without letters that some font draws as a source's letter:
    a Cyrillic and a Latin A are the same picture, which the base has learned."""
    drawn, letters = glyphs.render(glyphs.SCRIPTS[pair.target], pair.frame)
    source, _ = glyphs.render(glyphs.SCRIPTS[pair.source], pair.frame)
    seen = {glyph.numpy().tobytes() for glyph in source}
    known = [i for i, glyph in enumerate(drawn) if glyph.numpy().tobytes() in seen]
    new = ~torch.isin(letters, letters[known])
    return drawn[new], letters[new].unique(return_inverse=True)[1]


def _shares(letters: Tensor) -> dict[str, Tensor]:
    """Shapes per part, in proportion to its images, of all letters about as many."""
    whole, count = sum(_LETTER_PARTS.values()), len(letters)
    sizes = {n: round(count * s / whole) for n, s in _LETTER_PARTS.items() if n != "pool"}
    parts = dealt(sizes, letters.tolist(), count)
    draw = generator("study", "shapes")
    # in any order, so that those that come once more are of all letters too
    mixed = {n: torch.randperm(len(part), generator=draw) for n, part in parts.items()}
    return {name: torch.tensor(parts[name])[mixed[name]] for name in _LETTER_PARTS}
