"""Quantiles of a stream in constant memory: counts in buckets whose width grows with the value.

Every quantile is within 1 % of a value that was seen (the DDSketch bound, arXiv 1908.10693). Not
for small samples that fit in memory anyway: numpy.quantile is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

ACCURACY = 0.01
"""Largest relative error of a quantile."""

_GAMMA = (1 + ACCURACY) / (1 - ACCURACY)
_SCALE = 1 / math.log(_GAMMA)
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Percentiles:
    """What a digest knows: nan everywhere (count 0) when nothing was added.

    Quantiles are within 1 % of a seen value; mean, least and most are exact. In the unit of what
    was added.
    """

    count: int = 0
    mean: float = math.nan
    least: float = math.nan
    p50: float = math.nan
    p90: float = math.nan
    p99: float = math.nan
    most: float = math.nan


@dataclass(slots=True)
class Digest:
    """Non-negative values and how often each came, in buckets of 2 % width."""

    count: int = 0
    total: float = 0.0
    least: float = math.inf
    most: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, value: float, times: int = 1) -> None:
        """Counts ``value`` (>= 0, finite) ``times`` times; ``times`` of 0 changes nothing."""
        if times <= 0:
            return
        self.count += times
        self.total += value * times
        if value < self.least:
            self.least = value
        if value > self.most:
            self.most = value
        # Zero and near-zero values share the lowest bucket.
        key = math.ceil(math.log(value) * _SCALE) if value > _SMALLEST else -(1 << 30)
        self.buckets[key] += times

    def include(self, other: Digest) -> None:
        """Counts all values of the other as well; what it answers is as if it had seen them."""
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.most = max(self.most, other.most)
        self.buckets.update(other.buckets)

    def quantile(self, share: float) -> float:
        """The value below which ``share`` (0 to 1) of the counts lie; nan when empty."""
        if not self.count:
            return math.nan
        rank = share * (self.count - 1)
        seen = 0
        for key in sorted(self.buckets):
            seen += self.buckets[key]
            if seen > rank:
                middle = 2 * _GAMMA**key / (1 + _GAMMA) if key > -(1 << 30) else 0.0
                return min(max(middle, self.least), self.most)
        return self.most

    def percentiles(self) -> Percentiles:
        """The usual quantiles at once."""
        if not self.count:
            return Percentiles()
        return Percentiles(
            count=self.count,
            mean=self.total / self.count,
            least=self.least,
            p50=self.quantile(0.5),
            p90=self.quantile(0.9),
            p99=self.quantile(0.99),
            most=self.most,
        )
