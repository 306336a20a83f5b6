"""What happened between two scrapes: increases, rates, means and percentiles. Pure.

The same answers that Prometheus gives with ``increase``, ``rate`` and ``histogram_quantile``, for
who has no Prometheus: a counter that fell began anew, a percentile is interpolated inside its
bucket. Without an older scrape, everything since the processes began.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dashboards.scrape import Labels, Scrape

_INFINITE = "+Inf"


@dataclass(frozen=True)
class Spread:
    """Of ``count`` observations: mean and percentiles in the metric's unit; None without any."""

    count: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


class Window:
    """Increases from one scrape to a later one.

    What a process has counted that the older scrape did not reach is left out, because it may be
    the work of hours; a new series of a known process counts from 0.

    Args:
        old: None: since the processes began.
    """

    def __init__(self, old: Scrape | None, new: Scrape):
        self._old = old
        self._new = new
        self._known = None if old is None else set(_processes(old))

    @property
    def seconds(self) -> float | None:
        """Length; None when nobody knows."""
        return None if self._old is None else self._new.at - self._old.at

    def increase(self, name: str, **match: str) -> float | None:
        """Sum over the series with these labels; None when there is none.

        Args:
            name: of a sample: ``afd_x_total``, ``afd_x_sum``.
        """
        found = list(self._increases(name, match).values())
        return sum(found) if found else None

    def by(self, name: str, label: str, **match: str) -> dict[str, float]:
        """``increase`` for each value of a label."""
        return _grouped(self._increases(name, match), label)

    def rate(self, name: str, **match: str) -> float | None:
        """Increase per second; None when there is no series or no length."""
        found = self.increase(name, **match)
        return None if found is None or not self.seconds else found / self.seconds

    def mean(self, name: str, **match: str) -> float | None:
        """Mean of a histogram's observations; None without any."""
        count = self.increase(f"{name}_count", **match)
        total = self.increase(f"{name}_sum", **match)
        return total / count if count and total is not None else None

    def spread(self, name: str, **match: str) -> Spread:
        """Mean and percentiles of a histogram's observations, all its series together."""
        buckets = {
            float(edge.replace(_INFINITE, "inf")): count
            for edge, count in self.by(f"{name}_bucket", "le", **match).items()
        }
        return Spread(
            round(buckets.get(math.inf, 0)),
            self.mean(name, **match),
            *(quantile(share, buckets) for share in (0.5, 0.9, 0.99)),
        )

    def _increases(self, name: str, match: Mapping[str, str]) -> dict[Labels, float]:
        old = {} if self._old is None else self._old.series.get(name, {})
        found = {}
        for labels, value in _matching(self._new, name, match):
            if self._known is not None and process(labels) not in self._known:
                continue
            before = old.get(labels, 0.0)
            found[labels] = value - before if value >= before else value
        return found


def now(scrape: Scrape, name: str, **match: str) -> float | None:
    """Sum of a gauge over the series with these labels; None when there is none."""
    found = [value for _, value in _matching(scrape, name, match)]
    return sum(found) if found else None


def now_by(scrape: Scrape, name: str, label: str, **match: str) -> dict[str, float]:
    """``now`` for each value of a label."""
    return _grouped(dict(_matching(scrape, name, match)), label)


def quantile(share: float, buckets: Mapping[float, float]) -> float | None:
    """As Prometheus' ``histogram_quantile``, for edges above 0.

    Args:
        share: 0 to 1.
        buckets: cumulative counts by upper edge, infinity included.

    Returns:
        the value, in the edges' unit; the last finite edge when it lies above that; None when
        nothing was counted.
    """
    total = buckets.get(math.inf, 0.0)
    edges = sorted(buckets)
    if total <= 0 or len(edges) < 2:
        return None
    rank = share * total
    below_edge, below = 0.0, 0.0
    for edge in edges:
        count = max(below, buckets[edge])
        if count >= rank and count > below:
            if math.isinf(edge):
                break
            return below_edge + (edge - below_edge) * max(0.0, rank - below) / (count - below)
        below_edge, below = edge, count
    return max(edge for edge in edges if not math.isinf(edge))


def process(labels: Labels) -> tuple[str, str] | None:
    """Which process a series is of; None for the manager's."""
    found = dict(labels)
    return (found.get("role", ""), found["actor_id"]) if "actor_id" in found else None


def _processes(scrape: Scrape) -> Iterable[tuple[str, str] | None]:
    return (process(labels) for values in scrape.series.values() for labels in values)


def _matching(
    scrape: Scrape, name: str, match: Mapping[str, str]
) -> Iterable[tuple[Labels, float]]:
    wanted = set(match.items())
    return (
        (labels, value)
        for labels, value in scrape.series.get(name, {}).items()
        if wanted.issubset(labels)
    )


def _grouped(values: Mapping[Labels, float], label: str) -> dict[str, float]:
    groups: dict[str, float] = {}
    for labels, value in values.items():
        group = dict(labels).get(label, "")
        groups[group] = groups.get(group, 0.0) + value
    return groups
