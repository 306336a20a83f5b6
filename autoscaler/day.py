"""A day of requests made from an hour of a real trace, and a system to serve it.

Public traces with lengths span about an hour. What is real here: the order of the requests, their
lengths, prefixes and the shape of their bursts. What is assumed: how the mean rate moves over the
day (``SHAPE``), and that every hour is like the recorded one, begun elsewhere. Say so wherever
results are shown (``NOTE``). Not for replaying the days: see ``replay``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autoscaler.core import Timing
from autoscaler.limits import Limits
from autoscaler.policy import SLO
from autoscaler.replay import Scenario
from planner.curves import Linear
from planner.errors import PlannerError
from planner.events import ChangeTimes
from planner.latency import PRESETS, Latencies
from planner.simulator import Cluster
from planner.traces import Trace, prefix_reuse

DAY = 86_400.0
HOUR = 3_600.0

NOTE = (
    "a day made of an hour: the recorded trace is played again and again from other starting "
    "points; its lengths, order and bursts are real, the daily rise and fall is assumed"
)

TROUGH = 0.3
"""Rate at night over the rate at the peak. The published week of Azure's conversation service has a
peak of about three times its valley (DynamoLLM, arXiv 2408.00741)."""

PEAK_AT = 14 * HOUR
SHARPNESS = 1.6
"""Makes the mean 0.6 of the peak; a plain cosine would have 0.65."""


def shape(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rate over the peak's, 0..1, at seconds since midnight: a raised cosine with a long night."""
    phase = np.cos(2 * np.pi * (seconds - PEAK_AT) / DAY)
    return TROUGH + (1 - TROUGH) * ((1 + phase) / 2) ** SHARPNESS


@dataclass(frozen=True, eq=False)
class Day:
    """A day's requests.

    Attributes:
        trace: arrivals in seconds since midnight.
        cached: prompt tokens of each request that an unbounded prefix cache of the recorded hour
            would have held; zeros where the trace does not say.
        note: what is assumed, for people.
    """

    trace: Trace
    cached: NDArray[np.int64]
    note: str


def make_day(hour: Trace, peak: float, *, seed: int = 0, hours: float = 24.0) -> Day:
    """A day from a recorded trace.

    The recording is laid end to end as often as needed, every time from another starting point, as
    if it were a circle. Then time is stretched so that the mean rate follows ``shape``: gaps keep
    their proportions, so a burst stays a burst.

    Args:
        hour: the recording; its own rises and falls within the hour stay in.
        peak: requests per second at the top of the day, on average over the recording.
        seed: of the starting points.
        hours: stop then; for tests.

    Raises:
        PlannerError: the peak is not above 0, or the trace has no rate.
    """
    if not peak > 0 or not 0 < hours <= 24:
        raise PlannerError(f"peak is {peak} and hours {hours}; expected more than 0, at most a day")
    rng = np.random.default_rng(seed)
    scaled = hour.scaled(peak)
    lap = scaled.duration + 1.0 / peak
    grid = np.linspace(0.0, hours * HOUR, 24 * 60 + 1)
    rates = shape(grid)
    # Seconds that would have passed at the peak's rate until then.
    passed = np.concatenate(([0.0], np.cumsum((rates[1:] + rates[:-1]) / 2 * np.diff(grid))))
    own, rows = [], []
    start = 0.0
    while start < passed[-1]:
        first = int(rng.integers(len(scaled)))
        order = np.roll(np.arange(len(scaled)), -first)
        since = (scaled.arrival[order] - scaled.arrival[first]) % lap
        own.append(start + since)
        rows.append(order)
        start += lap
    times, index = np.concatenate(own), np.concatenate(rows)
    kept = times <= passed[-1]
    times, index = times[kept], index[kept]
    arrival = np.interp(times, passed, grid)
    reuse = np.zeros(len(hour), np.int64) if hour.blocks is None else prefix_reuse(hour)
    day = Trace(
        arrival=np.maximum.accumulate(arrival),
        prompt=hour.prompt[index],
        output=hour.output[index],
        source=hour.source,
        skipped=hour.skipped,
    )
    note = (
        f"{NOTE} (night {TROUGH:g} of the peak, mean {rates.mean():.2f}); "
        f"{peak:.3g} requests/s at the peak, {peak / hour.rate:.3g} times the recorded rate"
    )
    return Day(day, reuse[index], note)


def latencies(cycle: float) -> Latencies:
    """Stage times in seconds, in the proportions of ``deepseek-v3-npu``.

    With 0.25 ms per cycle the part of the experts' step that does not depend on its requests is
    25 ms: the time in which a node of eight H100 reads 671 GB of weights; a request takes them 21
    us, 2.5 PFLOP/s at DeepSeek-V3's active experts. An attention worker reads 600 GB/s at 250 KB of
    KV per token. 0.5 ms is a system of half the speed.

    Nine tenths of the experts' fixed time is taken as reading weights, of which each FFN worker has
    its share (the paper has one FFN worker and need not say). Prefill on top of an attention step
    is set to 0.75 of the experts' time per token, about the ratio of DeepSeek-V3's active
    parameters outside and inside of its routed experts.

    Args:
        cycle: seconds per cycle.
    """
    preset = PRESETS["deepseek-v3-npu"]
    times = preset.scaled(attention=cycle, ffn=cycle, transfer=cycle, unit="s")
    assert isinstance(times.ffn, Linear)
    return replace(
        times,
        prefill=Linear(0.75 * times.ffn.a, 0.0),
        weights_share=0.9,
        source=f"proportions of deepseek-v3-npu, {1e3 * cycle:g} ms per cycle",
    )


@dataclass(frozen=True)
class Case:
    """A trace and the system that serves it.

    Args:
        name: of the trace, for people and keys.
        file: name of the recording.
        speed: the top of the day over the recording's rate.
        cycle: see ``latencies``.
        slots: of an attention worker.
        kv_tokens: context tokens that fit on one attention worker.
        chunk: prompt tokens in a step at most.
        slo: targets.
        prepare: seconds until a started worker serves, of either role.
        drain: seconds that a retiring attention worker may go on; then its requests move.
    """

    name: str
    file: str
    speed: float
    cycle: float
    slots: int
    kv_tokens: int
    chunk: int
    slo: SLO
    prepare: float = 30.0
    drain: float = 10.0

    def cluster(self, attention: int, ffn: int) -> Cluster:
        """The system with so many workers; they step as afflux's do, in one lane and one round.

        One lane, because with many attention workers the others keep the FFN side busy; and it
        takes half as long to simulate.
        """
        return Cluster(
            latencies(self.cycle),
            attention,
            ffn,
            self.slots,
            lanes=1,
            boarding="asynchronous",
            steps="joint",
            kv_tokens=self.kv_tokens,
            max_queue=1024,
            prefill="colocated",
            prefill_chunk=self.chunk,
            changes=ChangeTimes(self.prepare, self.prepare, 0.05, self.drain),
        )

    def scenario(
        self, day: Day, attention: int, ffn: int, timing: Timing | None = None
    ) -> Scenario:
        """The day on the system, starting with so many workers."""
        return Scenario(
            self.cluster(attention, ffn),
            day.trace,
            self.slo,
            LIMITS,
            timing or TIMING,
            WINDOW,
            day.cached,
        )


LIMITS = Limits((1, 18), (1, 9))
TIMING = Timing(interval=10.0, cooldown=10.0, shrink_cooldown=120.0, stale=50.0, least_window=20.0)
WINDOW = 60.0

CASES = {
    "azure": Case("azure", "azure23_conv.csv", 2.0, 0.5e-3, 64, 100_000, 1024, SLO(2.0, 0.2)),
    "azure4x": Case("azure4x", "azure23_conv.csv", 4.0, 0.5e-3, 64, 100_000, 1024, SLO(2.0, 0.2)),
    "mooncake": Case(
        "mooncake", "mooncake_conv.jsonl", 1.0, 0.25e-3, 32, 200_000, 2048, SLO(10.0, 0.2)
    ),
}
"""Rates and systems are chosen so that the top of the day takes ten to twenty workers. The fewer
they are, the coarser is one worker: Azure's trace at twice and at four times its rate shows what
that costs."""
