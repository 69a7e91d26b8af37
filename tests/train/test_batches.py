"""The order of photos: a function of seed and number."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels.train.batches import Order, generator


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    photos = iter(draw(st.permutations(range(sum(counts)))))
    groups = tuple(tuple(next(photos) for _ in range(count)) for count in counts)
    return Order(groups, draw(st.integers(1, 5)), draw(st.integers(0, 2**32 - 1)))


@given(orders(), st.integers(0, 3))
def test_an_epoch_shows_every_photo_once_and_fills_up(order, epoch):
    batches = [order[epoch * order.epoch + i] for i in range(order.epoch)]
    assert all(len(batch) == order.batch for batch in batches)
    seen = Counter(photo for batch in batches for photo in batch)
    for group in order.groups:
        assert all(set(batch) <= set(group) or not set(batch) & set(group) for batch in batches)
        shown = sum(seen[photo] for photo in group)
        assert shown == -(-len(group) // order.batch) * order.batch
        # what fills up goes around the group: no photo twice more than another
        times = [seen[photo] for photo in group]
        assert min(times) >= 1 and max(times) - min(times) <= 1
    assert sum(seen.values()) == order.epoch * order.batch


@given(orders(), st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_a_batch_depends_on_seed_and_number_alone(order, numbers):
    fresh = {n: list(Order(order.groups, order.batch, order.seed)[n]) for n in sorted(numbers)}
    torch.rand(3)
    assert [list(order[n]) for n in numbers] == [fresh[n] for n in numbers]


@given(orders(), st.integers(0, 30))
def test_what_a_reader_does_to_a_batch_is_its_own(order, number):
    before = list(order[number])
    assert list(order[number]) == before


def test_epochs_and_seeds_differ():
    photos = (tuple(range(50)),)
    first, second = Order(photos, 50, 0)[0], Order(photos, 50, 0)[1]
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    assert Order(photos, 50, 1)[0] != first


def test_sizes_are_mixed_over_the_epoch():
    """Not one size after the other."""
    order = Order((tuple(range(20)), tuple(range(20, 40))), 1, 0)
    sizes = [order[i][0] >= 20 for i in range(40)]
    assert sum(a != b for a, b in itertools.pairwise(sizes)) > 9


def test_a_small_group_repeats():
    assert sorted(Order(((7, 8),), 5, 0)[0]).count(7) in (2, 3)
    assert list(Order(((7,),), 3, 0)[4]) == [7, 7, 7]


@pytest.mark.parametrize("groups", [(), ((1, 2), ())])
def test_an_empty_group_is_named(groups):
    with pytest.raises(ValueError, match="groups: expected photos in every group"):
        Order(groups, 1, 0)


KEYS = st.lists(st.integers(0, 99) | st.text(max_size=3), min_size=1, max_size=3).map(tuple)


@given(KEYS, KEYS)
def test_generators_are_their_keys(a, b):
    def draw(key):
        return torch.randint(2**62, (2,), generator=generator(*key)).tolist()

    assert draw(a) == draw(a)
    assert (draw(a) == draw(b)) == (a == b)


def test_a_generator_is_the_same_everywhere():
    """A run resumes on another machine: the numbers are fixed, not only repeatable."""
    assert torch.randint(1000, (4,), generator=generator(0, "step", 1)).tolist() == [
        784,
        206,
        179,
        252,
    ]
