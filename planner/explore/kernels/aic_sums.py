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
        self._outside: list[tuple[float, str]] = []

    def add(self, name: str, seconds: Array, labels: Labels) -> None:
        """Adds operations; ``labels`` as ``aic_coverage`` gives them."""
        for label in range(len(ORDER)):
            chosen = np.where(labels == label, seconds, 0.0)
            self.parts[label] += chosen
            if label == _OUTSIDE:
                self._outside.append((float(np.max(chosen, initial=0.0)), name))

    def work(self, works: Iterable[Work], tokens: Array) -> None:
        """Adds operations that depend on tokens only; none of them runs without tokens."""
        some = tokens > 0
        if not np.any(some):
            return
        for one in works:
            seconds = np.where(some, one.seconds(tokens), 0.0)
            self.add(one.name, seconds, one.cover.labels(tokens))

    def take(self, other: Sums, share: Array) -> None:
        """Adds ``share`` of another's times."""
        self.parts += other.parts * share
        self._outside += other._outside

    @property
    def outside(self) -> Array:
        """Share of each load's time that lies outside of the tables."""
        total = self.parts.sum(axis=0)
        return np.divide(self.parts[_OUTSIDE], total, out=np.zeros_like(total), where=total > 0)

    @property
    def culprit(self) -> str:
        """The operation with the longest time outside of the tables."""
        return max(self._outside, default=(0.0, ""))[1]

    def time(self) -> Time:
        """As the protocol wants it, without empty parts."""
        return Time(
            {
                key: self.parts[label]
                for label, key in enumerate(ORDER)
                if np.any(self.parts[label] > 0) or key is Provenance.MEASURED
            }
        )
