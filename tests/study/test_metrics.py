"""Every metric once more, the slow way."""

from __future__ import annotations

import math

import pytest
import torch

from a3fta_kernels.study import metrics


@pytest.fixture(scope="module")
def clouds():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(14, 3, generator=draw), torch.randn(19, 3, generator=draw) * 1.5 + 0.5


def test_kid_is_the_mean_of_the_kernel_over_different_pairs(clouds):
    x, y = (c.double().tolist() for c in clouds)

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 3 + 1) ** 3

    def within(z):
        pairs = [(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]
        return sum(kernel(a, b) for a, b in pairs) / len(pairs)

    between = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    assert metrics.kid(*clouds) == pytest.approx(within(x) + within(y) - 2 * between, rel=1e-9)


def test_kid_of_two_draws_of_one_distribution_is_about_zero():
    draw = torch.Generator().manual_seed(1)
    same = metrics.kid(*torch.randn(2, 400, 4, generator=draw))
    x, y = torch.randn(2, 400, 4, generator=draw)
    assert abs(same) < 0.1 * metrics.kid(x, y + 1)


def test_manifolds_by_counting(clouds):
    x, y = (c.double().tolist() for c in clouds)
    k = 2

    def reach(z):
        return [sorted(math.dist(a, b) for b in z)[k] for a in z]

    rx, ry = reach(x), reach(y)
    found = metrics.manifolds(*clouds, neighbours=k)
    inside = [[math.dist(a, b) < r for b, r in zip(y, ry, strict=True)] for a in x]
    assert found["precision"] == sum(map(any, inside)) / len(x)
    assert found["density"] == pytest.approx(sum(map(sum, inside)) / k / len(x))
    reached = [any(math.dist(a, b) < r for a, r in zip(x, rx, strict=True)) for b in y]
    assert found["recall"] == sum(reached) / len(y)
    near = [min(math.dist(a, b) for a in x) < r for b, r in zip(y, ry, strict=True)]
    assert found["coverage"] == sum(near) / len(y)
    assert 0 < found["recall"] < 1 and 0 < found["precision"] < 1


def test_samples_that_are_one_image_cover_nothing():
    draw = torch.Generator().manual_seed(2)
    real = torch.randn(50, 3, generator=draw)
    found = metrics.manifolds(real[:1].repeat(20, 1), real)
    assert found["recall"] == 0 and found["precision"] == 1 and found["coverage"] < 0.3


def test_vendi_counts_different_samples():
    axes = torch.eye(6)
    assert metrics.vendi(axes) == pytest.approx(6)
    assert metrics.vendi(axes[:2].repeat(5, 1)) == pytest.approx(2)
    assert metrics.vendi(torch.ones(7, 6)) == pytest.approx(1)
    # fewer samples than features, and more: the same number by both Gram matrices
    x = torch.randn(5, 9, generator=torch.Generator().manual_seed(3))
    assert metrics.vendi(x.repeat(3, 1)) == pytest.approx(metrics.vendi(x))


def test_near_copies_are_closer_than_the_closest_real_images():
    draw = torch.Generator().manual_seed(4)
    train, real = torch.randn(5, 8, generator=draw), torch.randn(200, 8, generator=draw)
    fresh = torch.randn(300, 8, generator=draw)
    assert metrics.near_copies(torch.cat([train, fresh[:5]]), train, real) == 0.5
    assert metrics.near_copies(fresh, train, real) < 0.05


def test_all_of_them_have_names(clouds):
    samples, real = clouds
    assert tuple(metrics.measure(samples, real[:4], real[4:])) == metrics.NAMES
