"""What became of a frontend's requests lately, one record each, and what is in flight now.

``RequestMetrics`` writes, whoever wants to know reads with a cursor of its own; memory is bounded,
and records that were written over before somebody read them are counted as missed. All times are on
the frontend's monotonic clock. Not for Prometheus (``request_metrics``), nor for sending anything
(``reporting``).
"""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

KEPT = 8192
LIVE = 1024
"""Most requests in flight that a batch tells of one by one, those that wait longest first."""

PACED = 8
"""Tokens from which on the pace of a running request says something."""

GAP_STEP = 0.04
"""Width of a bin of times between two tokens, as a logarithm."""

_PENDING = 1024


class First(NamedTuple):
    """A request's first token came at ``at``, ``ttft`` seconds after it arrived.

    ``cached`` prompt tokens came from a prefix cache.
    """

    number: int
    at: float
    ttft: float
    prompt: int
    cached: int


class Done(NamedTuple):
    """A request ended at ``at``; seconds, tokens, and None for what there is not.

    ``outcome`` is one of stop, length, abort and error; ``replays`` counts how often it was started
    again.
    """

    number: int
    at: float
    arrival: float
    ttft: float | None
    tpot: float | None
    e2e: float | None
    prompt: int
    output: int
    cached: int
    outcome: str
    replays: int


Record = First | Done


class Watched(Protocol):
    """What the log wants to know of a request; see ``request_metrics.Journey``."""

    arrived: float
    prompt_tokens: int
    cached: int
    replays: int
    first: float | None
    last: float
    tokens: int

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        ...

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first."""
        ...


def gap_of(number: int) -> float:
    """The middle of a bin of times between two tokens, seconds."""
    return math.exp((number + 0.5) * GAP_STEP)


class RequestLog:
    """Belongs to one event loop.

    Args:
        clock: seconds, monotonic.
        kept: records that are remembered.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, kept: int = KEPT):
        self._clock = clock
        self._records: deque[Record] = deque(maxlen=kept)
        self._number = 0
        self._live: WeakSet[Any] = WeakSet()
        self._incarnation = uuid.uuid4().hex
        self._gaps: Counter[int] = Counter()
        self._pending: list[float] = []
        self._arrived = self._rejected = self._tokens = self._replays = 0

    # -- what happens ----------------------------------------------------------------------------

    def arrived(self, request: Watched) -> None:
        """It came, and is in flight until it is done (or forgotten by everybody)."""
        self._arrived += 1
        self._live.add(request)

    def turned_away(self) -> None:
        """One came and was not let in."""
        self._arrived += 1
        self._rejected += 1

    def refused(self) -> None:
        """One that had arrived found no actor in time; it is ``done`` besides."""
        self._rejected += 1

    def first_token(self, request: Watched, at: float) -> None:
        """Its first token came; counted in ``tokens`` besides."""
        self._number += 1
        self._records.append(
            First(
                self._number,
                at,
                at - request.arrived,
                request.prompt_tokens,
                request.cached,
            )
        )

    def gap(self, seconds: float) -> None:
        """A later token came after so long."""
        self._pending.append(seconds)
        if len(self._pending) >= _PENDING:
            self._count_gaps()

    def tokens(self, count: int) -> None:
        """So many tokens came."""
        self._tokens += count

    def done(self, request: Watched, outcome: str) -> None:
        """Nothing more will come of it."""
        self._live.discard(request)
        self._number += 1
        self._replays += request.replays
        self._records.append(
            Done(
                number=self._number,
                at=self._clock(),
                arrival=request.arrived,
                ttft=request.ttft_s,
                tpot=request.tpot_s,
                e2e=None if request.first is None else request.last - request.arrived,
                prompt=request.prompt_tokens,
                output=request.tokens,
                cached=request.cached,
                outcome=outcome,
                replays=request.replays,
            )
        )

    # -- whoever asks ----------------------------------------------------------------------------

    def since(self, number: int, limit: int | None = None) -> dict[str, Any]:
        """Records above ``number``, oldest first, and what is in flight; nothing is taken away.

        Args:
            number: of the newest record that the caller knows; 0 for none.
            limit: at most so many records; None for all. The rest comes with the next call.

        Returns:
            ``role``, ``incarnation``, ``clock`` and ``unix`` of this moment; ``number`` of the last
            record given, ``missed``, ``events`` (``First`` and ``Done``); ``waits``: how long those
            have been here that got no token yet; ``paces``: seconds per token so far of running
            ones with ``PACED`` tokens and more, the time since the last token included;
            totals ``arrived``, ``rejected``, ``tokens``, ``replays`` and ``gaps``: times between
            tokens, bin -> count (``gap_of``).
        """
        seen = number if 0 <= number <= self._number else 0
        oldest = self._number - len(self._records)
        start = max(seen, oldest) - oldest
        stop = len(self._records) if limit is None else min(len(self._records), start + limit)
        self._count_gaps()
        now = self._clock()
        waits, paces = self._in_flight(now)
        return {
            "role": "frontend",
            "incarnation": self._incarnation,
            "clock": now,
            "unix": time.time(),
            "number": oldest + stop,
            "missed": max(0, oldest - seen),
            "events": [self._records[index] for index in range(start, stop)],
            "waits": waits,
            "paces": paces,
            "arrived": self._arrived,
            "rejected": self._rejected,
            "tokens": self._tokens,
            "replays": self._replays,
            "gaps": dict(self._gaps),
        }

    def _in_flight(self, now: float) -> tuple[list[float], list[float]]:
        waits, paces = [], []
        for request in self._live:
            if request.first is None:
                waits.append(max(0.0, now - request.arrived))
            elif request.tokens >= PACED:
                so_far = max(now, request.last) - request.first
                paces.append(max(so_far / request.tokens, request.tpot_s or 0.0))
        return [sorted(values, reverse=True)[:LIVE] for values in (waits, paces)]  # type: ignore[return-value]

    def _count_gaps(self) -> None:
        pending, self._pending = self._pending, []
        self._gaps.update(math.floor(math.log(max(gap, 1e-6)) / GAP_STEP) for gap in pending)
