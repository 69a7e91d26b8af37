from __future__ import annotations

import math

import pytest

from a3fta_kernels.study.statistics import difference, holm, interval


def test_the_interval_of_a_mean_is_students():
    # quantile of t with 3 degrees of freedom at 97.5 %: 3.18245
    values = [1.0, 2.0, 4.0, 5.0]
    deviation = math.sqrt((4 + 1 + 1 + 4) / 3)
    low, high = interval(values)
    assert high - 3 == pytest.approx(3.18245 * deviation / 2, rel=1e-5)
    assert 3 - low == pytest.approx(high - 3)


def test_an_interval_needs_two_numbers_that_are_numbers():
    assert all(map(math.isnan, interval([1.0])))
    assert all(map(math.isnan, interval([1.0, math.nan])))


def test_p_says_on_which_side_of_the_bound_the_mean_is():
    found = difference([0.9, 1.0, 1.1, 1.05])
    assert found.p_above(0) < 1e-3 < 0.99 < found.p_below(0)
    assert found.p_above(2) > 0.99 and found.p_below(2) < 1e-3
    assert found.p_above(found.low) == pytest.approx(0.025, abs=1e-4)
    assert found.p_below(found.high) == pytest.approx(0.025, abs=1e-4)


def test_equal_differences_have_no_spread():
    found = difference([1.0, 1.0, 1.0])
    assert found.p_above(0) == 0 and found.p_above(1) == 1 and found.p_above(2) == 1


def test_nothing_is_said_of_what_has_diverged():
    found = difference([5.0, math.nan, 6.0])
    assert found.p_above(0) == found.p_below(0) == 1 and math.isnan(found.low)
    assert difference([]).p_above(0) == 1


def test_holm_multiplies_by_how_many_are_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
