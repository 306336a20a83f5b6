"""What the frontends' reports of one window add up to. Pure; see ``telemetry`` for the window.

What is in flight counts as soon as it is late: a request that waits has a time to first token of at
least that. Otherwise a system that drowns would look well until its requests end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from autoscaler.histories import RequestHistory
from autoscaler.policy import SLO
from cluster.request_log import Done, First, gap_of
from planner.digest import Digest, Percentiles
from planner.records import Sums

GONE_S = 15.0
"""Seconds without a word after which a frontend's requests in flight don't count any more."""


class Door:
    """What the frontends' reports add up to.

    Args:
        slo: see ``Telemetry``.
        floor: when the last change took effect, on our clock.
    """

    def __init__(self, slo: SLO, floor: float):
        self._slo = slo
        self._floor = floor
        self.ttft, self.tpot, self.itl = Digest(), Digest(), Digest()
        self.sums = Sums()
        self.waits: list[float] = []
        self.paces: list[float] = []
        self.running = self.waiting = self.rejected = self.cached = self.prompt = 0
        self._arrived = self._tokens = 0
        self._began, self._ended = math.inf, -math.inf  # of what is known, on our clock

    @property
    def arrival_rate(self) -> float:
        """Requests per second that came, let in or not."""
        return self._rate(self._arrived)

    @property
    def tokens_rate(self) -> float:
        """Output tokens per second."""
        return self._rate(self._tokens)

    def _rate(self, count: int) -> float:
        return count / (self._ended - self._began) if self._ended > self._began else 0.0

    def add(self, told: RequestHistory, start: float, now: float) -> None:
        """Add a frontend's window."""
        for record in told.records(start):
            if isinstance(record, First):
                self._add_first(record, told.offset)
            else:
                self._add_done(record, told.offset)
        self._add_totals(told, start)
        if now - told.heard <= GONE_S:
            latest, passed = told.latest, max(0.0, now - told.reach)
            self.running += latest["running"]
            self.waiting += latest["waiting"]
            self.waits += [wait + passed for wait in latest["waits"]]
            self.paces += latest["paces"]

    def _add_first(self, record: First, offset: float) -> None:
        self.cached += record.cached
        self.prompt += record.prompt
        if self._ours(record.at - record.ttft + offset, record.at + offset):
            self.ttft.add(max(0.0, record.ttft))

    def _add_done(self, record: Done, offset: float) -> None:
        if record.outcome not in ("stop", "length") or record.output < 1:
            return
        self.sums.add(record.prompt, record.output)
        if record.tpot is not None and record.ttft is not None:
            first = record.arrival + record.ttft
            if self._ours(first + offset, record.at + offset):
                self.tpot.add(max(0.0, record.tpot))

    def _add_totals(self, told: RequestHistory, start: float) -> None:
        ends = told.between(start, self._floor)
        if ends is None:
            return
        old, new, seconds = ends
        # One that came or went meanwhile was not there all the time: rates are over all of it.
        self._began = min(self._began, told.reach - seconds)
        self._ended = max(self._ended, told.reach)
        self._arrived += max(0, new["arrived"] - old["arrived"])
        self._tokens += max(0, new["tokens"] - old["tokens"])
        self.rejected += max(0, new["rejected"] - old["rejected"])
        for number, count in sorted(new["gaps"].items()):
            self.itl.add(gap_of(number), count - old["gaps"].get(number, 0))

    def _ours(self, began: float, ended: float) -> bool:
        """Whether most of a time was spent since the last change: it is of this system's doing."""
        return ended - max(began, self._floor) >= (ended - began) / 2

    def late(self, seen: Digest, so_far: Iterable[float], target: float) -> Percentiles:
        """What was seen, and with it what is in flight and longer than the target or all seen."""
        least = min(target, seen.most if seen.count else math.inf)
        for value in sorted(so_far):
            if value > least:
                seen.add(value)
        return seen.percentiles()
