"""Held-out sets and folds: sizes, a partition, classes in proportion, the same every time."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from a3fta_kernels.train.errors import TrainingError
from a3fta_kernels.train.split import Split, split

SEEDS = st.integers(0, 2**32)


@pytest.mark.parametrize(
    ("count", "rule", "size"),
    [
        (0, "none", 0),
        (2, "none", 0),
        (3, "kfold", 0),
        (15, "kfold", 0),
        (16, "holdout", 3),
        (20, "holdout", 3),
        (24, "holdout", 3),
        (100, "holdout", 12),
    ],
)
def test_auto(count, rule, size):
    found = split(count, "auto", seed=0)
    assert found.rule == rule
    assert len(found.heldout) == size
    assert len(found.folds) == (3 if rule == "kfold" else 0)


@given(st.integers(2, 60), st.integers(2, 60), SEEDS, st.data())
def test_folds_are_a_partition_of_even_sizes(count, folds, seed, data):
    assume(folds <= count)
    groups = data.draw(st.none() | st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    found = split(count, "kfold", folds=folds, seed=seed, groups=groups)
    assert sorted(i for fold in found.folds for i in fold) == list(range(count))
    assert all(fold == tuple(sorted(fold)) for fold in found.folds)
    lengths = [len(fold) for fold in found.folds]
    assert len(lengths) == folds and max(lengths) - min(lengths) <= 1
    for group in set(groups or ()):
        shares = [sum(groups[i] == group for i in fold) for fold in found.folds]
        assert max(shares) - min(shares) <= 1


@given(st.integers(1, 40), st.integers(1, 40), SEEDS)
def test_a_held_out_set_has_the_size_asked_for(count, number, seed):
    assume(number < count)
    found = split(count, "holdout", holdout=number, seed=seed)
    assert found == Split("holdout", heldout=found.heldout)
    assert len(set(found.heldout)) == number
    assert set(found.heldout) <= set(range(count))
    assert found.heldout == tuple(sorted(found.heldout))


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), SEEDS, st.data())
def test_a_held_out_set_takes_from_classes_in_proportion(members, seed, data):
    groups = [name for name, size in enumerate(members) for _ in range(size)]
    number = data.draw(st.integers(1, max(1, len(groups) // 2)))
    groups = data.draw(st.permutations(groups))
    found = split(len(groups), "holdout", holdout=number, seed=seed, groups=groups)
    taken = Counter(groups[i] for i in found.heldout)
    for name, size in enumerate(members):
        assert abs(taken[name] - number * size / len(groups)) < 1.5
        # none is missing from training
        assert taken[name] < size


def test_a_class_of_one_stays_in_training():
    groups = ["many"] * 12 + ["one", "two", "three", "four"]
    for seed in range(20):
        found = split(16, "holdout", holdout=4, seed=seed, groups=groups)
        assert all(groups[i] == "many" for i in found.heldout)


@pytest.mark.parametrize("count", [2, 8, 20])
def test_a_number_is_a_wish_to_hold_out(count):
    found = split(count, "auto", holdout=1, seed=0)
    assert found == split(count, "holdout", holdout=1, seed=0) and len(found.heldout) == 1


def test_leave_one_out():
    found = split(5, "leave-one-out", folds=2, seed=3)
    assert found.rule == "leave-one-out"
    assert sorted(found.folds) == [(0,), (1,), (2,), (3,), (4,)]


def test_none():
    assert split(20, "none", seed=0) == Split("none")


def test_the_seed_decides():
    # these numbers must not change: a run that is resumed splits again
    assert split(20, "holdout", seed=0).heldout == (3, 12, 15)
    assert split(20, "holdout", seed=0) == split(20, "holdout", seed=0)
    assert len({split(20, "holdout", seed=seed).heldout for seed in range(20)}) > 10
    taken = Counter(i for seed in range(400) for i in split(20, "holdout", seed=seed).heldout)
    assert len(taken) == 20 and max(taken.values()) < 120


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (8, {"rule": "most"}, "expected one of auto, holdout, .*'most'"),
        (2, {"rule": "holdout"}, "3 of 2 photos leave nothing to train on"),
        (1, {"rule": "holdout"}, "3 of 1 photos leave nothing"),
        (4, {"rule": "holdout", "holdout": 4}, "4 of 4 photos leave nothing"),
        (4, {"rule": "kfold", "folds": 5}, "got 5 folds of 4 photos"),
        (4, {"rule": "kfold", "folds": 1}, "got 1 folds of 4 photos"),
        (4, {"rule": "auto", "folds": 9}, "got 9 folds of 4 photos"),
        (1, {"rule": "leave-one-out"}, "got 1 folds of 1 photos"),
    ],
)
def test_refusals(count, options, message):
    with pytest.raises(TrainingError, match=message):
        split(count, seed=0, **options)


def test_groups_of_another_length():
    with pytest.raises(ValueError, match="groups: expected 4, one for each photo, got 3"):
        split(4, "kfold", seed=0, groups=[1, 2, 3])
