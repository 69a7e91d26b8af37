"""What a study is about: a pre-trained model, real images in disjoint parts, features.

The runs know no more of a pair of source and target, or of a user's pipeline, than this.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image
from torch import Tensor

from ..train.families import Family, Row
from ..train.split import split
from .features import Extractor

# tensors of a row that are the image; the others are what the model is told
_IMAGE = ("mean", "std")
PARTS = ("pool", "heldout", "tuning", "tuning_heldout", "reference")


def dealt(
    sizes: Mapping[str, int], groups: Sequence[Hashable] | None, count: int
) -> dict[str, tuple[int, ...]]:
    """Indices below `count` by part, so many each, of the groups in proportion; the rest is
    "pool"."""
    rest, parts = list(range(count)), {}
    for name, size in sizes.items():
        of_rest = None if groups is None else [groups[i] for i in rest]
        chosen = split(len(rest), "holdout", holdout=size, seed=0, groups=of_rest).heldout
        parts[name] = tuple(rest[i] for i in chosen)
        rest = [i for i in rest if i not in set(parts[name])]
    return parts | {"pool": tuple(rest)}


@dataclass(frozen=True)
class Subject:
    """Disjoint parts of the real images, by index:

    pool: training subsets of k images are drawn from it. heldout: for the held-out loss.
    tuning, tuning_heldout: the same for learning rates. reference: stands for the real thing.

    fresh: makes the family with a denoiser as it was pre-trained. source: images like those the
    base was trained on, for forgetting. extractors: by name; the first is the primary one.
    """

    name: str
    fresh: Callable[[], Family]
    rows: Sequence[Row]
    digests: Sequence[str]
    images: Sequence[Image.Image]
    labels: Sequence[int] | None
    parts: Mapping[str, tuple[int, ...]]
    extractors: Mapping[str, Extractor]
    size: tuple[int, int]
    empty: Row = field(default_factory=dict)
    source: Sequence[Row] = ()

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for name in PARTS:
            part = self.parts[name]
            if seen.intersection(part) or len(set(part)) < len(part):
                raise ValueError(f"parts[{name!r}]: expected images of no other part, got some")
            seen.update(part)

    def check(self, k: int, part: str = "pool") -> None:
        """Raises ValueError where k images are too many for a part."""
        name, count = "k" if part == "pool" else f"{part}_k", len(self.parts[part])
        if k >= count:
            raise ValueError(f"{name}: expected less than the {count} images of {part}, got {k}")

    def subset(self, k: int, seed: int, part: str = "pool") -> tuple[int, ...]:
        """k images of a part, of its classes in proportion."""
        self.check(k, part)
        pool = self.parts[part]
        groups = None if self.labels is None else [self.labels[i] for i in pool]
        chosen = split(len(pool), "holdout", holdout=k, seed=seed, groups=groups).heldout
        return tuple(pool[i] for i in chosen)

    def conditions(self, train: Sequence[int], count: int) -> list[Row]:
        """What `count` samples are told: what the training images are, in turn."""
        told = [{n: v for n, v in self.rows[i].items() if n not in _IMAGE} for i in train]
        return [told[i % len(told)] for i in range(count)]

    def features(self, extractor: str, part: Sequence[int]) -> Tensor:
        return self.extractors[extractor]([self.images[i] for i in part])
