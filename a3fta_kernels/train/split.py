"""Which photos training does not see: a held-out set where there are enough, else folds.

A held-out loss from two photos of sixteen is worth their loss; of five photos none can be
spared, so each is held out once, in a short run of its own (k-fold), and all train in the last.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from .errors import TrainingError

RULES = ("auto", "holdout", "kfold", "leave-one-out", "none")
_ENOUGH_TO_HOLD_OUT = 16
_ENOUGH_FOR_FOLDS = 3


@dataclass(frozen=True)
class Split:
    """Indices of photos, ascending.

    rule: "holdout", "kfold", "leave-one-out" or "none". heldout: never trained on (holdout).
    folds: a partition of all photos; each is held out once (kfold, leave-one-out).
    """

    rule: str
    heldout: tuple[int, ...] = ()
    folds: tuple[tuple[int, ...], ...] = ()


def split(
    count: int,
    rule: str,
    *,
    holdout: int | None = None,
    folds: int = 3,
    seed: int,
    groups: Sequence[Hashable] | None = None,
) -> Split:
    """Splits `count` photos; the same arguments give the same split everywhere.

    Args:
        rule: "auto" holds out from 16 photos on, makes folds of 3 to 15, and else does nothing.
        holdout: how many to hold out, also by "auto"; None: an eighth, and at least 3.
        folds: how many, for "kfold".
        groups: of each photo, its class: held-out sets and folds take from the classes in
            proportion, and a held-out set does not take the last of a class while others have
            more.
    """
    if rule not in RULES:
        raise TrainingError(f"split: expected one of {', '.join(RULES)}, got {rule!r}")
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: expected {count}, one for each photo, got {len(groups)}")
    if rule == "auto" and holdout is not None:
        rule = "holdout"
    elif rule == "auto":
        rule = "holdout" if count >= _ENOUGH_TO_HOLD_OUT else "kfold"
        rule = rule if count >= _ENOUGH_FOR_FOLDS else "none"
    shuffled = _by_group(count, seed, groups)
    if rule == "holdout":
        return Split(rule, heldout=_hold_out(shuffled, _number(count, holdout)))
    if rule == "none":
        return Split(rule)
    if rule == "leave-one-out":
        folds = count
    if not 2 <= folds <= count:
        raise TrainingError(
            f"split {rule}: expected at least 2 folds and a photo for each, "
            f"got {folds} folds of {count} photos"
        )
    # dealt like cards: neither folds nor a class's shares of them differ by more than one
    cards = [index for members in shuffled for index in members]
    return Split(rule, folds=tuple(tuple(sorted(cards[i::folds])) for i in range(folds)))


def _by_group(count: int, seed: int, groups: Sequence[Hashable] | None) -> list[list[int]]:
    # random() is the one method whose numbers Python promises to keep
    draw = random.Random(seed).random
    keys = [draw() for _ in range(count)]
    members: dict[Hashable, list[int]] = {}
    for index in sorted(range(count), key=keys.__getitem__):
        members.setdefault(None if groups is None else groups[index], []).append(index)
    return list(members.values())


def _number(count: int, holdout: int | None) -> int:
    number = max(3, round(count / 8)) if holdout is None else holdout
    if number >= count:
        raise TrainingError(
            f"holdout: {number} of {count} photos leave nothing to train on; "
            "hold out fewer, or use folds"
        )
    return number


def _hold_out(groups: list[list[int]], number: int) -> tuple[int, ...]:
    """The first photos when each class lies spread evenly over 0..1, a class of one at 1/2."""
    places = [
        ((place + 0.5) / len(members), index)
        for members in groups
        for place, index in enumerate(members)
    ]
    places.sort(key=lambda item: item[0])
    return tuple(sorted(index for _, index in places[:number]))
