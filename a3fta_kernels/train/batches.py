"""Which photos make a batch, and every random number: functions of the seed and of counters.

Nothing here has a state, so a run that resumes, or one with other processes, sees the same.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def generator(*key: int | str) -> torch.Generator:
    """A generator on the CPU, seeded by its key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)


@dataclass(frozen=True)
class Order:
    """Batches without end, of photos of one size, each epoch in an order of its own.

    groups: photos by size. A group that does not fill its last batch fills it with photos of
    the same group from the beginning of the epoch; one smaller than a batch repeats.
    """

    groups: tuple[tuple[int, ...], ...]
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups):
            raise ValueError("groups: expected photos in every group, got an empty one")

    @property
    def epoch(self) -> int:
        """Batches in an epoch."""
        return sum(-(-len(group) // self.batch) for group in self.groups)

    def __getitem__(self, number: int) -> Sequence[int]:
        """The photos of batch `number`, 0, 1, 2, ..."""
        return self._shuffled(number // self.epoch)[number % self.epoch]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - as long-lived as the run
    def _shuffled(self, epoch: int) -> list[list[int]]:
        draw = generator(self.seed, "order", epoch)
        batches = []
        for group in self.groups:
            mixed = [group[i] for i in torch.randperm(len(group), generator=draw)]
            for start in range(0, len(mixed), self.batch):
                chosen = mixed[start : start + self.batch]
                chosen += [mixed[i % len(mixed)] for i in range(self.batch - len(chosen))]
                batches.append(chosen)
        return [batches[i] for i in torch.randperm(len(batches), generator=draw)]
