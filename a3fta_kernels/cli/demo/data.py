"""The demo's real digits: 20 to train on, others to select, to test and to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) in -1..1 and their classes (N,)."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class DemoData:
    """Four disjoint sets of handwritten digits.

    `train` is all that fine-tuning sees; `selection` chooses the step at which full tuning
    stops early; `heldout` gives the held-out loss; `reference` stands for the real thing in
    the sample metrics.
    """

    train: Digits
    selection: Digits
    heldout: Digits
    reference: Digits


def load(
    seed: int,
    train_per_class: int = 2,
    selection_per_class: int = 10,
    heldout_per_class: int = 20,
    reference_per_class: int | None = None,
) -> DemoData:
    """scikit-learn's handwritten digits, split per class by `seed`.

    The rest of each class goes to `reference`, or `reference_per_class` of it.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).float().div(8).sub(1)[:, None]
    labels = torch.from_numpy(raw.target).long()
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], [], []]
    for digit in range(CLASSES):
        mine = (labels == digit).nonzero().flatten()
        mine = mine[torch.randperm(len(mine), generator=generator)]
        sizes = [train_per_class, selection_per_class, heldout_per_class]
        rest = len(mine) - sum(sizes)
        sizes.append(rest if reference_per_class is None else min(rest, reference_per_class))
        for part, chunk in zip(parts, mine[: sum(sizes)].split(sizes), strict=True):
            part.append(chunk)
    index = [torch.cat(part) for part in parts]
    return DemoData(*(Digits(images[i], labels[i]) for i in index))
