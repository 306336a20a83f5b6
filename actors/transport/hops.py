"""Where the time of a hop goes, without synchronised clocks.

Stamps of one hop (A: attention side's clock, F: FFN side's clock):

    queued_ns A  dispatch() was called        start_ns F  kernel began
    sent_ns   A  the write was posted         end_ns   F  kernel ended
    recv_ns   F  poll() saw the frame         reply_ns F  the answer's write was posted
    back_ns   A  poll() saw the answer

Durations on one clock need no synchronisation. The two wire times do: their *sum* is exact,
(back - sent) - (reply - recv), and it is split with an offset estimate as NTP makes it, from the
hops with the least wire time, where the two ways are most nearly equal. The split is wrong by at
most half of that least wire time. Not for export to Prometheus: ``snapshot`` returns plain dicts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

STAGES = ("queue", "wire_out", "boarding", "compute", "reply", "wire_back", "total")
_WINDOW = 8  # offset candidates kept; each is the best of one batch, so old drift falls out
_BATCH = 256
_RECENT = 1024
_ENOUGH = 16


class HopStamps(NamedTuple):
    """Raw stamps of one hop in ns; see the module for whose clock each is on."""

    queued_ns: int
    sent_ns: int
    recv_ns: int
    start_ns: int
    end_ns: int
    reply_ns: int
    back_ns: int


class HopTimes(NamedTuple):
    """One hop in microseconds; all stages but ``total`` add up to ``total``."""

    queue: float
    wire_out: float
    boarding: float
    compute: float
    reply: float
    wire_back: float
    total: float


def hop_times(stamps: HopStamps, offset_ns: float) -> HopTimes:
    """Stages of a hop, given how far the peer's clock is ahead of ours."""
    queued, sent, recv, start, end, reply, back = stamps
    return HopTimes(
        (sent - queued) / 1e3,
        (recv - sent - offset_ns) / 1e3,
        (start - recv) / 1e3,
        (end - start) / 1e3,
        (reply - end) / 1e3,
        (back - reply + offset_ns) / 1e3,
        (back - queued) / 1e3,
    )


class OffsetEstimator:
    """How many ns a peer's clock is ahead of ours: NTP's formula on the fastest recent hops."""

    def __init__(self, window: int = _WINDOW):
        self._candidates: deque[tuple[int, float]] = deque(maxlen=window)

    @property
    def offset_ns(self) -> float:
        """0.0 until the first hop."""
        return min(self._candidates)[1] if self._candidates else 0.0

    @property
    def error_ns(self) -> float:
        """The true offset lies within plus or minus this; infinite until the first hop."""
        return min(self._candidates)[0] / 2 if self._candidates else float("inf")

    def add(self, stamps: HopStamps) -> None:
        """Consider one hop."""
        self.add_batch(np.array([stamps], dtype=np.int64))

    def add_batch(self, stamps: np.ndarray) -> None:
        """Consider hops as rows of int64 [n, 7]; only the fastest can matter."""
        sent, recv, reply, back = stamps[:, 1], stamps[:, 2], stamps[:, 5], stamps[:, 6]
        wire = (back - sent) - (reply - recv)
        best = int(np.argmin(wire))
        offset = ((recv[best] - sent[best]) + (reply[best] - back[best])) / 2
        self._candidates.append((int(wire[best]), float(offset)))


class Histogram:
    """Counts in fixed buckets, four per power of two from 1 us to about 67 s."""

    EDGES_US = 2.0 ** (np.arange(0, 26 * 4 + 1) / 4)

    def __init__(self) -> None:
        self.counts = np.zeros(len(self.EDGES_US) + 1, dtype=np.int64)
        self.sum_us = 0.0

    def add(self, values_us: np.ndarray) -> None:
        """Values below 1 us (or below 0: an offset that is not exact) go to the first bucket."""
        index = np.searchsorted(self.EDGES_US, values_us, side="left")
        self.counts += np.bincount(index, minlength=len(self.counts))
        self.sum_us += float(np.sum(values_us))

    def merge(self, other: Histogram) -> None:
        """Add another one's values."""
        self.counts += other.counts
        self.sum_us += other.sum_us

    def counts_below(self, edges_us: Sequence[float]) -> list[int]:
        """Counts by coarser buckets, the last one for what lies above all edges.

        Args:
            edges_us: upper edges, ascending, each (nearly) one of ``EDGES_US``; nothing is
                interpolated.

        Raises:
            ValueError: an edge that is none of these.
        """
        places = np.searchsorted(self.EDGES_US, np.asarray(edges_us) * (1 - 1e-6))
        found = self.EDGES_US[np.minimum(places, len(self.EDGES_US) - 1)]
        if not np.allclose(found, edges_us, rtol=1e-6, atol=0.0):
            raise ValueError(
                f"edges {list(edges_us)} us are not all among a histogram's own, which are four "
                "per power of two from 1 us on"
            )
        below = np.cumsum(self.counts)
        return np.diff(np.concatenate(([0], below[places], below[-1:]))).tolist()

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Upper edge in us of the bucket in which the share falls (0.0 when empty)."""
        total = self.count
        if not total:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), share * total, side="left"))
        return float(self.EDGES_US[min(index, len(self.EDGES_US) - 1)])

    def snapshot(self) -> dict:
        """Plain numbers: count, sum_us, p50_us, p99_us and {upper edge in us: count}."""
        buckets = {
            ("inf" if i == len(self.EDGES_US) else f"{self.EDGES_US[i]:.4g}"): int(n)
            for i, n in enumerate(self.counts)
            if n
        }
        return {
            "count": self.count,
            "sum_us": self.sum_us,
            "p50_us": self.quantile(0.5),
            "p99_us": self.quantile(0.99),
            "buckets": buckets,
        }


class HopTotals:
    """Hops to any number of peers, stage by stage."""

    def __init__(self) -> None:
        self.stages = {stage: Histogram() for stage in STAGES}

    def add(self, hops: HopHistograms) -> None:
        """Add a peer's."""
        for stage, total in self.stages.items():
            total.merge(hops.histogram(stage))

    def copy(self) -> HopTotals:
        """Independent of this one from now on."""
        twin = HopTotals()
        for stage, total in twin.stages.items():
            total.merge(self.stages[stage])
        return twin


class HopHistograms:
    """Hops to one peer. ``add`` is one append; the arithmetic is done for many hops at once."""

    def __init__(self) -> None:
        self.offset = OffsetEstimator()
        self._stages = {stage: Histogram() for stage in STAGES}
        self._pending: list[HopStamps] = []
        self._wire_ns: deque[int] = deque(maxlen=_RECENT)

    def add(self, stamps: HopStamps) -> None:
        self._pending.append(stamps)
        if len(self._pending) >= _BATCH:
            self._flush()

    def times(self, stamps: HopStamps) -> HopTimes:
        """Stages of one hop with the offset known so far."""
        self._flush()
        return hop_times(stamps, self.offset.offset_ns)

    def histogram(self, stage: str) -> Histogram:
        self._flush()
        return self._stages[stage]

    def take_wire_s(self) -> float | None:
        """Median seconds on the wire, there and back, since it was last asked; None: too few."""
        self._flush()
        if len(self._wire_ns) < _ENOUGH:
            return None
        found = float(np.median(self._wire_ns)) * 1e-9
        self._wire_ns.clear()
        return found

    def snapshot(self) -> dict:
        """{stage: histogram snapshot} and the offset estimate, as plain data."""
        self._flush()
        stages: dict = {stage: self._stages[stage].snapshot() for stage in STAGES}
        known = self.offset.error_ns != float("inf")
        stages["clock_offset_us"] = self.offset.offset_ns / 1e3 if known else None
        stages["clock_error_us"] = self.offset.error_ns / 1e3 if known else None
        return stages

    def _flush(self) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        stamps = np.array(pending, dtype=np.int64)
        self.offset.add_batch(stamps)
        columns = stamps.T
        _, sent, recv, _, _, reply, back = columns
        self._wire_ns.extend(((back - sent) - (reply - recv)).tolist())
        times = hop_times(HopStamps(*columns), self.offset.offset_ns)
        for stage, values in zip(STAGES, times, strict=True):
            self._stages[stage].add(np.asarray(values))
