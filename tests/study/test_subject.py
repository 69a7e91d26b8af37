from __future__ import annotations

import dataclasses
from collections import Counter

import pytest


def test_subsets_are_of_their_part_in_proportion_and_follow_the_seed(subject):
    found = subject.subset(6, 3)
    assert set(found) < set(subject.parts["pool"]) and len(found) == 6
    assert Counter(subject.labels[i] for i in found) == {0: 3, 1: 3}
    assert found == subject.subset(6, 3) != subject.subset(6, 4)
    assert set(subject.subset(4, 3, "tuning")) < set(subject.parts["tuning"])


def test_parts_are_apart(subject):
    parts = dict(subject.parts) | {"heldout": (19, 20)}
    with pytest.raises(ValueError, match=r"parts\['heldout'\]: expected images of no other part"):
        dataclasses.replace(subject, parts=parts)


def test_k_is_less_than_there_is(subject):
    with pytest.raises(ValueError, match="k: expected less than the 20 images of pool, got 20"):
        subject.subset(20, 0)
    with pytest.raises(ValueError, match="tuning_k: expected less than the 10 images of tuning"):
        subject.check(10, "tuning")


def test_samples_are_told_what_the_training_images_are(subject):
    told = subject.conditions((1, 2), 5)
    assert [int(row["label"]) for row in told] == [1, 0, 1, 0, 1]
    assert all(set(row) == {"label"} for row in told)


def test_features_are_of_the_part(subject):
    assert subject.features("halves", subject.parts["heldout"]).shape == (8, 32)
    assert subject.features("pixels", (3, 4)).shape == (2, 64)
