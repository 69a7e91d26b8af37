"""Paired differences of seeds, their intervals, and Holm's correction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Over pairs: the mean difference, its 95 % interval (Student's t), and their number.

    values: the differences themselves, in the order of the seeds.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def p_above(self, bound: float) -> float:
        """One-sided p of "the mean is above `bound`" by a t-test; 1 where there are too few."""
        if self.count < 2 or not all(map(math.isfinite, self.values)):
            return 1.0
        error = _error(self.values)
        if error == 0:  # t is infinite, or 0 / 0
            return 0.0 if self.mean > bound else 1.0
        from scipy import stats

        return float(stats.t.sf((self.mean - bound) / error, self.count - 1))

    def p_below(self, bound: float) -> float:
        flipped = Difference(-self.mean, -self.high, -self.low, tuple(-v for v in self.values))
        return flipped.p_above(-bound)


def difference(values: Sequence[float]) -> Difference:
    """Of one number per seed. The interval is NaN for less than two, or where one is NaN."""
    found = tuple(values)
    mean = math.fsum(found) / len(found) if found else math.nan
    low, high = interval(found)
    return Difference(mean, low, high, found)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    from scipy import stats

    mean = math.fsum(values) / len(values)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * _error(values)
    return mean - reach, mean + reach


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    n = len(values)
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def holm(values: Sequence[float]) -> list[float]:
    """p values that are right for all of them together (Holm, "A Simple Sequentially Rejective
    Multiple Test Procedure", 1979), in the order in which they came."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        found[i] = highest
    return found
