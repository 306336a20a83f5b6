"""What a part of the search found: its best, its front, and how near it came to the targets.

Parts are merged into the answer for a mode, in any order, and can be written as plain data. Which
parts there are is ``search``'s business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from planner.explore.kept import point_data, read_point
from planner.explore.pareto import front
from planner.explore.points import Point, Targets


@dataclass(frozen=True)
class Reach:
    """How near configurations came, whatever was best about each.

    Args:
        ttft, tpot: least seconds of any that fits memory; inf where none was timed.
        memory, room: bytes on the fullest GPU of the configuration that lacks the least of those
            that don't fit, and what it has; inf and nan where none was too large.
        uncovered: configurations without kernel times.
        missing: what the source said about one of them.
    """

    ttft: float = math.inf
    tpot: float = math.inf
    memory: float = math.inf
    room: float = math.nan
    uncovered: int = 0
    missing: str = ""

    def __or__(self, other: Reach) -> Reach:
        tighter = self if self._lacks <= other._lacks else other
        return Reach(
            min(self.ttft, other.ttft),
            min(self.tpot, other.tpot),
            tighter.memory,
            tighter.room,
            self.uncovered + other.uncovered,
            self.missing or other.missing,
        )

    @property
    def _lacks(self) -> float:
        return self.memory - self.room if math.isfinite(self.memory) else math.inf


NOWHERE = Reach()
"""Of no configurations at all."""


@dataclass(frozen=True)
class Found:
    """The result of one part of the search, or of several merged.

    Args:
        best: the point with the most tokens/s that holds the targets.
        front: Pareto front of all, whatever the targets.
        reach: for saying why there is no best.
        evaluated: configurations whose time was computed.
    """

    best: Point | None = None
    front: tuple[Point, ...] = ()
    reach: Reach = NOWHERE
    evaluated: int = 0

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "best": None if self.best is None else point_data(self.best),
            "front": [point_data(point) for point in self.front],
            "reach": vars(self.reach),
            "evaluated": self.evaluated,
        }

    @staticmethod
    def read(data: Mapping[str, Any]) -> Found:
        """What ``data`` gave."""
        best = data["best"]
        return Found(
            None if best is None else read_point(best),
            tuple(read_point(point) for point in data["front"]),
            Reach(**data["reach"]),
            data["evaluated"],
        )


def merged(parts: Iterable[Found]) -> Found:
    """All of them as one."""
    parts = list(parts)
    reach = NOWHERE
    for part in parts:
        reach |= part.reach
    return Found(
        better(*(part.best for part in parts)),
        front(point for part in parts for point in part.front),
        reach,
        sum(part.evaluated for part in parts),
    )


def better(*points: Point | None) -> Point | None:
    """The one with the most tokens/s; of equals on fewer GPUs, then with less TPOT."""
    there = [point for point in points if point is not None]
    return max(there, key=lambda p: (p.tokens_per_s, -p.gpus, -p.tpot), default=None)


def of_points(points: Iterable[Point], targets: Targets, reach: Reach = NOWHERE) -> Found:
    """What a mode that lists its points found.

    Args:
        points: that fit memory.
        targets: that the best holds.
        reach: what is known besides, of configurations without a point.
    """
    points = list(points)
    near = Reach(
        min((point.ttft for point in points), default=math.inf),
        min((point.tpot for point in points), default=math.inf),
    )
    held = better(*(point for point in points if point.meets(targets)))
    return Found(held, front(points), reach | near, len(points))
