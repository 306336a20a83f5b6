"""Times of many loads, added up by where in the measured tables they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.explore.kernels.adaptive import Adaptive
from planner.explore.kernels.aic_coverage import ORDER, Labels, TokenCover
from planner.explore.kernels.base import Array, Provenance, Time

_OUTSIDE = ORDER.index(Provenance.EXTRAPOLATED)


@dataclass(frozen=True)
class Work:
    """Operations that depend on tokens only and were measured at the same numbers of these.

    Args:
        name: of one of them, for refusals.
        cover: of all of them.
        seconds: of all of them together.
    """

    name: str
    cover: TokenCover
    seconds: Adaptive


def group(
    names: Sequence[str], covers: Iterable[TokenCover], total: Callable[[list[int], int], float]
) -> list[Work]:
    """Puts operations with equal covers together.

    Args:
        names: of operations.
        covers: of each.
        total: seconds of operations, by position, for a number of tokens.
    """
    together: dict[TokenCover, list[int]] = {}
    for position, cover in enumerate(covers):
        together.setdefault(cover, []).append(position)

    def timed(positions: list[int]) -> Callable[[int], float]:
        return lambda tokens: total(positions, tokens)

    return [
        Work(names[positions[0]], cover, Adaptive(timed(positions), cover.points))
        for cover, positions in together.items()
    ]


class Sums:
    """Seconds by provenance.

    Args:
        shape: of the loads.
    """

    def __init__(self, shape: tuple[int, ...]):
        self.parts = np.zeros((len(ORDER), *shape))
        self._outside = np.zeros(shape)
        self._culprits: list[tuple[float, str]] = []

    def add(self, name: str, seconds: Array, labels: Labels, refusable: bool = True) -> None:
        """Adds operations.

        Args:
            labels: as ``aic_coverage`` gives them.
            refusable: count them in ``outside``.
        """
        for label in range(len(ORDER)):
            chosen = np.where(labels == label, seconds, 0.0)
            self.parts[label] += chosen
            if label == _OUTSIDE and refusable:
                self._outside += chosen
                self._culprits.append((float(np.max(chosen, initial=0.0)), name))

    def work(self, works: Iterable[Work], tokens: Array, refusable: bool = True) -> None:
        """Adds operations that depend on tokens only; none of them runs without tokens."""
        some = tokens > 0
        if not np.any(some):
            return
        for one in works:
            seconds = np.where(some, one.seconds(tokens), 0.0)
            self.add(one.name, seconds, one.cover.labels(tokens), refusable)

    def take(self, other: Sums, share: Array) -> None:
        """Adds ``share`` of another's times."""
        self.parts += other.parts * share
        self._outside += other._outside * share
        self._culprits += other._culprits

    def between(self, other: Sums, share: float) -> Sums:
        """Times between these and another's in logarithms, at ``share`` of the way; no point of it
        was measured, and what is outside of either's tables is outside."""
        total, found = self.total, Sums(self.parts.shape[1:])
        some = total > 0
        ratio = np.divide(other.total, total, out=np.ones_like(total), where=some)
        outside = np.maximum(self.outside, other.outside)
        seconds = total * ratio**share
        found.parts[ORDER.index(Provenance.INTERPOLATED)] = seconds * (1.0 - outside)
        found.parts[_OUTSIDE] = seconds * outside
        found._outside = seconds * outside
        found._culprits = self._culprits + other._culprits
        return found

    @property
    def total(self) -> Array:
        """Seconds of each load."""
        seconds: Array = self.parts.sum(axis=0)
        return seconds

    @property
    def outside(self) -> Array:
        """Share of each load's time that lies outside of the tables, as far as it counts."""
        total = self.total
        return np.divide(self._outside, total, out=np.zeros_like(total), where=total > 0)

    @property
    def culprit(self) -> str:
        """The operation with the longest time outside of the tables."""
        return max(self._culprits, default=(0.0, ""))[1]

    def time(self) -> Time:
        """As the protocol wants it, without empty parts."""
        return Time(
            {
                key: self.parts[label]
                for label, key in enumerate(ORDER)
                if np.any(self.parts[label] > 0) or key is Provenance.MEASURED
            }
        )
