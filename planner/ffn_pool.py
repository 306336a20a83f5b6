"""The FFN workers: one queue of frames, and one call at a time over all of them.

They share the experts, so a call visits every worker and the one with the hot experts sets the
pace. With barrier boarding a call takes one frame; otherwise all of the oldest one's layer that
have come, min 1, and it never waits for more. What a frame is, and where it goes after, is the
business of ``steps``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from planner.clock import Clock
from planner.members import Group
from planner.spans import SpanLog

if TYPE_CHECKING:
    from planner.simulator import Cluster


class FfnPool:
    """Serves the frames of groups.

    Args:
        cluster: what is simulated.
        clock: simulated time.
        spans: records the calls.
        returned: called when a group's results are back at its attention workers.

    Attributes:
        count: workers that serve; 0 when all were lost.
        calls: calls begun.
    """

    def __init__(
        self, cluster: Cluster, clock: Clock, spans: SpanLog, returned: Callable[[Group], None]
    ):
        self.count = cluster.ffn
        self.calls = 0
        self._clock = clock
        self._spans = spans
        self._returned = returned
        self._latencies = cluster.latencies
        self._imbalance = cluster.imbalance
        self._rounds = cluster.layers
        self._one_by_one = cluster.boarding == "barrier"
        self._blocking = cluster.sends == "blocking"
        self._times: dict[int, float] = {}
        self._queue: deque[Group] = deque()
        self._call: list[Group] = []
        self._number = 0  # of the present call; a call that failed has an older one
        self._width = 0  # workers in the present call
        self._began = 0.0
        self._ends = 0.0
        self._free = 0.0
        self._blocked_until = 0.0
        self._asked = False
        self._busy = 0.0
        self._capacity = 0.0
        self._since = 0.0

    def arrive(self, group: Group) -> None:
        """Takes a group's frame."""
        group.arrived = self._clock.now
        self._queue.append(group)
        if not self._call:
            self._ask()

    def set_count(self, count: int, blocked_until: float) -> None:
        """Changes the number of workers; no call begins before ``blocked_until``.

        A call under way ends as it began.
        """
        now = self._clock.now
        self._capacity += self.count * (now - self._since)
        self._since = now
        self.count = count
        self._times.clear()
        self._blocked_until = max(self._blocked_until, blocked_until)
        self._ask()

    def fail(self) -> None:
        """The present call fails: its frames are sent again, before all others."""
        if self._call:
            self._busy -= (self._ends - self._clock.now) * self._width
            self._queue.extendleft(reversed(self._call))
            self._call = []
            self._number += 1

    def work(self) -> tuple[float, float]:
        """Time so far, summed over workers: busy, and there."""
        now = self._clock.now
        busy = self._busy - ((self._ends - now) * self._width if self._call else 0.0)
        return busy, self._capacity + self.count * (now - self._since)

    def _ask(self) -> None:
        """Looks at the queue once all that arrives at the present time has arrived."""
        if not self._asked and self._queue:
            self._asked = True
            ready = max(self._clock.now, self._blocked_until, self._free)
            self._clock.at(ready, self._board)

    def _board(self, _: None) -> None:
        self._asked = False
        now = self._clock.now
        if self._call or not self._queue or not self.count:
            return
        if now < self._blocked_until or now < self._free:
            self._ask()
            return
        if self._one_by_one:
            self._call = [self._queue.popleft()]
        else:
            # Frames of other layers need other experts: they stay behind.
            layer = self._queue[0].round
            self._call = [group for group in self._queue if group.round == layer]
            self._queue = deque(group for group in self._queue if group.round != layer)
        seconds = self._seconds(sum(group.load for group in self._call))
        self.calls += 1
        self._width = self.count
        self._busy += seconds * self._width
        self._began = now
        self._ends = now + seconds
        self._clock.at(self._ends, self._served, self._number)

    def _seconds(self, load: int) -> float:
        """Time of a call for so many requests, per layer round."""
        seconds = self._times.get(load)
        if seconds is None:
            share = 1.0 / self.count
            busiest = load * self._imbalance * share
            seconds = self._latencies.t_ffn(busiest, share) / self._rounds
            self._times[load] = seconds
        return seconds

    def _served(self, number: int) -> None:
        """The call is done: its results go back, the next one begins."""
        if number != self._number:
            return  # it failed meanwhile
        self._number += 1
        now = self._clock.now
        served, self._call = self._call, []
        for group in served:
            self._clock.at(now + group.transfer, self._returned, group)
            if group.recorded:
                self._record(group, now)
        if self._blocking:
            self._free = now + max(group.transfer for group in served)
        self._ask()

    def _record(self, group: Group, now: float) -> None:
        began = self._began
        self._spans.add(group.name, group.lane, "wait", group.arrived, began)
        self._spans.add("F", group.lane, "ffn", began, now)
        self._spans.add(group.name, group.lane, "f2a", now, now + group.transfer)
