"""The overfit monitor: what it asks, what it measures, what it decides."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3fta_kernels.train import monitor
from a3fta_kernels.train.batches import generator
from tests.train import setups

CPU = torch.device("cpu")
DIGESTS = ["a", "b", "c", "d"]


def test_ranges_part_the_levels():
    assert monitor.ranges(1) == [(0, 1)]
    assert monitor.ranges(4) == [(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)]


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_every_range_is_asked_as_often_and_levels_are_spread(bins, draws, seed):
    asked = monitor.questions([2, 0], DIGESTS, bins, draws, seed)
    assert len({q.key for q in asked}) == len(asked) == 2 * bins * draws
    for photo in (0, 2):
        for part in range(bins):
            levels = [q.level for q in asked if (q.photo, q.range) == (photo, part)]
            # one in each of `draws` equal parts of the range
            places = [(level * bins - part) * draws for level in levels]
            assert all(-1e-9 < place - i < 1 + 1e-9 for i, place in enumerate(places))


def test_questions_depend_on_photo_and_seed_alone():
    alone = monitor.questions([1], DIGESTS, 3, 2, 7)
    among = monitor.questions([3, 1, 0], DIGESTS, 3, 2, 7)
    assert alone == [q for q in among if q.photo == 1]
    # another place in the list of photos, the same photo
    moved = monitor.questions([0], ["b"], 3, 2, 7)
    assert [(q.level, q.key) for q in moved] == [(q.level, q.key) for q in alone]
    assert [q.level for q in monitor.questions([1], DIGESTS, 3, 2, 8)] != [q.level for q in alone]


@pytest.fixture(scope="module")
def told():
    """A family with a spread and a text, and photos of two sizes."""
    family = setups.Told()
    family.denoiser.eval()
    rows = []
    for i, (height, width) in enumerate([(8, 8), (8, 12), (8, 8), (8, 12)]):
        mean = setups.photo(i, height, width, channels=4)
        rows.append({"mean": mean, "std": mean.abs() / 2, **family.encode_text("x" * i)})
    return family, rows


def losses(told, asked, batch=3, **options):
    family, rows = told
    return monitor.losses(family, rows, asked, 3, batch, CPU, **options)


def by_hand(told, asked):
    """Question by question in float64, straight from the definition."""
    family, rows = told
    model, scheduler = family.denoiser.double(), family.noise.scheduler
    found = [[], [], []]
    for question in asked:
        row = rows[question.photo]
        spread = torch.randn(1, *row["mean"].shape, generator=generator(*question.key, "photo"))
        x = (row["mean"] + row["std"] * spread[0]).double()
        e = torch.randn(x.shape, generator=generator(*question.key, "noise")).double()
        t = min(int(question.level * 1000), 999)
        a = scheduler.alphas_cumprod[t].double()
        with torch.no_grad():
            text = row["prompt_embeds"][None].double()
            predicted = model((a.sqrt() * x + (1 - a).sqrt() * e)[None], t, text).sample[0]
        found[question.range].append(((predicted - e) ** 2).mean().item())
    model.float()
    return [sum(part) / len(part) for part in found]


def test_losses_are_those_of_a_plain_loop(told):
    asked = monitor.questions([0, 1, 3], DIGESTS, 3, 2, 0)
    expected = by_hand(told, asked)
    found = losses(told, asked)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 3


def kept(sums):
    """What adds up over processes, but only keeps what came."""

    def keep(values):
        sums.append(values)
        return values

    return keep


def test_losses_do_not_depend_on_batches_order_or_processes(told):
    asked = monitor.questions(range(4), DIGESTS, 3, 2, 0)
    expected = losses(told, asked)
    for batch in (1, 2, 50):
        assert losses(told, asked, batch) == pytest.approx(expected, rel=1e-6)
    mixed = random.Random(0).sample(asked, len(asked))
    assert losses(told, mixed) == pytest.approx(expected, rel=1e-6)
    for processes in (2, 3, 40):  # of 40 some have nothing to do
        sums = []
        for rank in range(processes):
            losses(told, asked, share=(rank, processes), reduce=kept(sums))
        assert sum(s[1].sum().item() for s in sums) == len(asked)
        everything = sum(sums)
        assert (everything[0] / everything[1]).tolist() == pytest.approx(expected, rel=1e-6)


def test_losses_are_the_same_twice_and_keep_no_graph(told):
    asked = monitor.questions([0], DIGESTS, 3, 1, 0)
    before = torch.get_rng_state()
    assert losses(told, asked) == losses(told, asked)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in told[0].denoiser.parameters())


def test_a_better_prediction_has_a_lower_loss(told):
    """Of a model that knows the noise the loss is 0, whatever the level."""
    _, rows = told
    asked = monitor.questions([0, 2], DIGESTS, 3, 2, 0)

    class Knowing(setups.Told):
        def predict(self, model, noisy, time, row):
            a = self.noise.scheduler.alphas_cumprod[time].view(-1, 1, 1, 1)
            return (noisy - a.sqrt() * row["mean"]) / (1 - a).sqrt()

    flat = [{**row, "std": torch.zeros_like(row["std"])} for row in rows]
    found = monitor.losses(Knowing(), flat, asked, 3, 4, CPU)
    assert max(found) < 1e-4 < min(losses(told, asked))


def curve(*losses, step=10):
    return [
        {"step": i * step, "heldout_mean": loss, "train_mean": 0.0} for i, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([], None),
        ([1.0], None),  # the base is no choice
        ([1.0, 2.0], 10),
        ([3.0, 2.0, 1.0, 1.5], 20),
        ([0.0, 2.0, 1.0, 1.0], 20),  # the earliest of equals, and not the base
        ([None, None, None], None),  # nothing held out
        ([1.0, None, 0.9, None, 0.95], 20),  # diverged in between
        ([1.0, None, None], None),
    ],
)
def test_the_best_step(losses, best):
    assert monitor.best_step(curve(*losses)) == best


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [
        ([3.0, 2.0, 1.0, 1.5], 0, False),
        ([3.0, 2.0, 1.0, 1.5], 1, True),
        ([3.0, 2.0, 1.0, 1.5], 2, False),
        ([3.0, 2.0, 1.0, 1.5, 1.0], 2, True),  # no better is not better
        ([3.0, 2.0, 1.0, 1.5, 0.9], 2, False),
        ([0.5, 2.0], 1, False),  # the base's loss does not count
        ([1.0, 0.9, None, None], 2, True),  # a diverged model has not become better
        ([1.0, None, None], 1, False),
        ([None] * 9, 1, False),
        ([], 1, False),
    ],
)
def test_patience(losses, patience, stops):
    assert monitor.exhausted(curve(*losses), patience) is stops


def test_folds_are_averaged_by_their_photos():
    """The mean over folds is that over photos, each left out once."""
    photos = [[1.0, 3.0], [5.0]]
    curves = [curve(9.0, sum(fold) / len(fold)) for fold in photos]
    assert monitor.average(curves, [2, 1]) == [
        {"step": 0, "heldout_mean": 9.0}, {"step": 10, "heldout_mean": 3.0}
    ]  # fmt: skip


def test_folds_that_stopped_early_count_where_all_of_them_are():
    curves = [curve(9.0, 3.0, 2.0, 1.0), curve(9.0, 4.0, 8.0)]
    found = monitor.average(curves, [1, 1])
    assert [e["step"] for e in found] == [0, 10, 20]
    assert monitor.best_step(found) == 10


def test_a_fold_that_diverged_leaves_its_step_out():
    found = monitor.average([curve(9.0, 3.0, 0.1), curve(9.0, 4.0, None)], [1, 1])
    assert [e["heldout_mean"] for e in found] == [9.0, 3.5, None]
    assert monitor.best_step(found) == 10


def test_a_mean_of_what_is_not_finite_is_none():
    assert monitor.mean([1.0, 2.0]) == 1.5
    assert monitor.mean([1.0, math.nan]) is None and monitor.mean([math.inf, 1.0]) is None


def test_photos_are_seen_as_often_as_a_folds():
    for folds, photos in ((2, 6), (3, 12), (5, 20)):
        for step in (1, 40, 125):
            seen = step * photos / (photos - photos // folds)  # of a fold's, in batches of one pass
            assert abs(monitor.same_passes(step, folds) - seen) <= 0.5
