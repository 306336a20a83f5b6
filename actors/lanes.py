"""Lanes: the micro-batches of one step that take turns on one thread.

``split`` cuts a batch by request, ``run`` lets one greenlet per lane advance until it waits for its
experts, ``LaneChooser`` decides how many lanes pay, from measured times. Nothing here knows vLLM or
the wire: a lane is any function that calls ``yield_lane`` where it would wait.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

MAX_LANES = 8


def split(tokens: Sequence[int], lanes: int) -> list[slice]:
    """Cut requests into at most ``lanes`` runs of about equal token counts, never inside a request.

    Args:
        tokens: scheduled tokens of each request of the step, in batch order.
        lanes: how many runs are wanted, at least 1.

    Returns:
        Slices over requests, in order, none empty, together covering all of them. Fewer than
        ``lanes`` when there are fewer requests.
    """
    lanes = max(1, min(lanes, len(tokens)))
    total, start, done = sum(tokens), 0, 0
    runs: list[slice] = []
    for lane in range(lanes):
        stop = start + 1
        done += tokens[start]
        target = total * (lane + 1) / lanes
        last = len(tokens) - (lanes - lane - 1)  # leave one request for every lane after this
        while stop < last and done + tokens[stop] / 2 <= target:
            done += tokens[stop]
            stop += 1
        if lane == lanes - 1:
            stop = len(tokens)
        runs.append(slice(start, stop))
        start = stop
    return runs


class LaneCancelled(GreenletExit):
    """Thrown into lanes that still wait when another lane of the step has failed."""


def current_lane() -> int:
    """Index of the running lane; 0 outside of ``run``."""
    return getattr(getcurrent(), "lane", 0)


def yield_lane() -> bool:
    """Let the next lane run. False when there is no other lane, so the caller has to wait."""
    lane = getcurrent()
    others = getattr(lane, "others", None)
    if not others or not others():
        return False
    lane.parent.switch()
    return True


def run(work: Sequence[Callable[[], Any]], enter: Callable[[int], None]) -> list[Any]:
    """Run one function per lane, in strict turns, and return their results in order.

    The turns never change order, so that lane 0 is always first to touch a layer: a later lane may
    read KV blocks that an earlier lane of the same step has written.

    Args:
        work: one function per lane. It calls ``yield_lane`` where it would otherwise wait.
        enter: called with the lane's index before each of its turns (to swap per-lane context).

    Raises:
        Whatever the first failing lane raises, after every other lane has been unwound.
    """
    results: list[Any] = [None] * len(work)
    alive: list[greenlet] = []

    def body(index: int) -> None:
        results[index] = work[index]()

    for index in range(len(work)):
        lane = greenlet(lambda index=index: body(index))
        lane.lane = index  # type: ignore[attr-defined]
        lane.others = lambda: len(alive) > 1  # type: ignore[attr-defined]
        alive.append(lane)
    try:
        while alive:
            for lane in list(alive):
                enter(lane.lane)  # type: ignore[attr-defined]
                lane.switch()
                if lane.dead:
                    alive.remove(lane)
    except BaseException:
        for lane in alive:
            if not lane.dead:
                enter(lane.lane)  # type: ignore[attr-defined]
                lane.throw(LaneCancelled)
        raise
    return results


class SizeTimes:
    """Measured seconds by batch size: a running mean per size class, lines in between.

    Classes are half powers of two, so one class holds what a decode batch drifts through. A single
    line for all sizes would forget the sizes that are not in use just now, and they are what a
    decision about splitting needs.

    Args:
        gain: weight of a new measurement.
    """

    def __init__(self, gain: float = 0.05):
        self.gain = gain
        self._means: dict[int, tuple[float, float]] = {}  # class -> mean tokens, mean seconds

    def add(self, n: float, t: float) -> None:
        """Take in that ``n`` tokens (> 0) took ``t`` seconds."""
        key = _size_class(n)
        if key not in self._means:
            self._means[key] = (n, t)
            return
        mean_n, mean_t = self._means[key]
        self._means[key] = (mean_n + self.gain * (n - mean_n), mean_t + self.gain * (t - mean_t))

    def knows(self, n: float) -> bool:
        """Whether something of about this size was measured."""
        return _size_class(n) in self._means

    @property
    def empty(self) -> bool:
        """Nothing was measured yet."""
        return not self._means

    @property
    def points(self) -> list[tuple[float, float]]:
        """(tokens, seconds) by rising size."""
        return sorted(self._means.values())

    def __call__(self, n: float) -> float:
        """Predicted seconds at ``n`` tokens; flat outside of a single point, 0.0 when empty."""
        points = self.points
        if not points:
            return 0.0
        if len(points) == 1:
            return points[0][1]
        place = min(max(bisect_left(points, (n,)), 1), len(points) - 1)
        (n0, t0), (n1, t1) = points[place - 1], points[place]
        return max(0.0, t0 + (t1 - t0) * (n - n0) / (n1 - n0))


def _size_class(n: float) -> int:
    return round(2 * log2(n))


@dataclass
class StageTimes:
    """Per layer and lane frame: attention, FFN compute and wire seconds, by tokens."""

    attention: SizeTimes = field(default_factory=SizeTimes)
    ffn: SizeTimes = field(default_factory=SizeTimes)
    transfer: SizeTimes = field(default_factory=SizeTimes)

    def layer_seconds(self, tokens: int, lanes: int) -> float:
        """Predicted time of one layer for a step of ``tokens`` in ``lanes`` equal lanes.

        With M lanes in strict turns a layer takes the longest of: all lanes' attention, all lanes'
        experts, and one lane's round trip (attention + transfer + experts), after 2601.21351's
        tau = max(t_A, t_C, t_F) with the lane's own chain kept as a bound.
        """
        n = tokens / lanes
        attention, ffn, transfer = self.attention(n), self.ffn(n), self.transfer(n)
        return max(lanes * attention, lanes * ffn, attention + transfer + ffn)


class LaneChooser:
    """Chooses how many lanes a step gets.

    A fixed number is obeyed as far as there are requests. ``None`` is automatic: the number with
    the shortest predicted layer time wins, fewer lanes on a near tie. A split whose lane size was
    never measured is tried once, and one step in ``explore_every`` tries a split again, so that
    the times stay true.
    """

    def __init__(
        self,
        fixed: int | None,
        *,
        max_lanes: int = 4,
        min_requests_per_lane: int = 4,
        margin: float = 0.03,
        explore_every: int = 64,
    ):
        if fixed is not None and not 1 <= fixed <= MAX_LANES:
            raise ValueError(f"lanes must be 'auto' or 1..{MAX_LANES}, got {fixed}")
        self.fixed = fixed
        self.max_lanes = max_lanes
        self.min_requests_per_lane = min_requests_per_lane
        self.margin = margin
        self.explore_every = explore_every
        self.times = StageTimes()
        self.recent: deque[int] = deque(maxlen=64)
        self._steps = 0

    @property
    def limit(self) -> int:
        """Most lanes that a step can get."""
        return self.fixed or self.max_lanes

    def choose(self, requests: int, tokens: int) -> int:
        """Lanes for a step of ``requests`` requests and ``tokens`` tokens (at least 1)."""
        lanes = self._choose(requests, tokens)
        self.recent.append(lanes)
        return lanes

    def _choose(self, requests: int, tokens: int) -> int:
        if self.fixed is not None:
            return max(1, min(self.fixed, requests))
        most = min(self.max_lanes, requests // self.min_requests_per_lane)
        if most < 2 or self.times.ffn.empty:
            return 1
        self._steps += 1
        for lanes in range(2, most + 1):
            if not self.times.ffn.knows(tokens / lanes):
                return lanes
        if self._steps % self.explore_every == 0:
            return 2 + self._steps // self.explore_every % (most - 1)
        best, best_time = 1, self.times.layer_seconds(tokens, 1) * (1 - self.margin)
        for lanes in range(2, most + 1):
            predicted = self.times.layer_seconds(tokens, lanes)
            if predicted < best_time:
                best, best_time = lanes, predicted * (1 - self.margin)
        return best
