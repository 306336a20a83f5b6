"""What a simulation measures, and what it returns: counts, latencies, series over time.

Memory doesn't grow with the number of requests: latencies go into digests, series have a fixed
number of bins, and single requests go to a sink of the caller's, or nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from planner.digest import Digest, Percentiles
from planner.members import Request
from planner.spans import Span
from planner.staff import Staff

BINS = 512
"""Most bins of a series; once they are full, two become one."""


class RequestRecord(NamedTuple):
    """A completed request; times in the unit of the latencies, from the simulation's start.

    ``number`` counts arrivals from 0. ``worker`` is the attention worker where it ended; -1 if
    prefill was all of it. ``first_token`` is nan for a request that was under way when the
    simulation began.
    """

    number: int
    arrival: float
    first_token: float
    finished: float
    prompt: int
    output: int
    worker: int
    replays: int


Sink = Callable[[RequestRecord], None]


@dataclass(frozen=True)
class Series:
    """What happened over time, in bins of one width; lists of equal length, for plots.

    Args:
        width: of a bin, in the unit of the latencies; bin i covers [i * width, (i + 1) * width).
        arrived, completed, tokens: how many in the bin (divide by ``width`` for a rate).
        attention, ffn: workers that served when the bin began.
        running, waiting: requests with a slot, and without, when the bin began.
    """

    width: float
    arrived: list[int]
    completed: list[int]
    tokens: list[int]
    attention: list[int]
    ffn: list[int]
    running: list[int]
    waiting: list[int]

    @property
    def times(self) -> list[float]:
        """When each bin begins."""
        return [index * self.width for index in range(len(self.tokens))]


@dataclass(frozen=True)
class Result:
    """What a simulated run came to.

    Times are in ``unit``, throughputs in output tokens per that unit, shares 0 to 1; a figure that
    nothing was measured for is nan. *Window* figures leave the drain of a closed loop out: they are
    over the time until 80 % of all requests are complete, as in arXiv 2601.21351. Where no total is
    known beforehand (open loop, closed loop without end) the window is the whole run.

    Args:
        unit: of the times.
        attention, ffn: workers at the start.
        throughput: tokens emitted per unit of time, in the window.
        per_instance: the same per worker, (attention + ffn) as they were over the window.
        throughput_completed: tokens of the requests completed in the window per unit of time; under
            ``throughput`` by what is in flight at its end.
        idle_attention, idle_ffn: idle share of the workers in the window, mean over workers.
        idle_attention_run, idle_ffn_run: the same over the whole run, drain included.
        window: length of the window.
        makespan: when the last request was complete, or ``until``.
        steps: steps of all groups.
        calls: FFN calls; fewer than steps where several frames boarded one call.
        step_time: mean time between two steps of a lane in the window, over lanes of a group that
            had work; what the papers call the TPOT of a step, M * tau.
        arrived, completed, rejected, in_flight: requests; arrived = completed + rejected +
            in_flight. ``in_flight`` is 0 unless the run was cut off or stalled.
        replayed: how often a request was started again on another worker.
        tokens: output tokens emitted, each once.
        ttft: time from arrival to first token, queueing included.
        tpot: (last token - first token) / (tokens - 1) of requests with two tokens and more.
        itl: time between two tokens of a request.
        e2e: time from arrival to last token.
        theta, nu2: moments of the completed requests (arXiv 2601.21351 v3).
        attention_left, ffn_left: workers at the end.
        series: over time.
        spans: of the first steps, as many as were asked for.
        requests: the completed requests when ``keep_requests`` was set; else empty.
        changes: (time, what) of scale events and failures that were carried out.
        staff: workers over time, starting and draining ones apart.
    """

    unit: str
    attention: int
    ffn: int
    throughput: float
    per_instance: float
    throughput_completed: float
    idle_attention: float
    idle_ffn: float
    idle_attention_run: float
    idle_ffn_run: float
    window: float
    makespan: float
    steps: int
    calls: int
    step_time: float
    arrived: int
    completed: int
    rejected: int
    in_flight: int
    replayed: int
    tokens: int
    ttft: Percentiles
    tpot: Percentiles
    itl: Percentiles
    e2e: Percentiles
    theta: float
    nu2: float
    attention_left: int
    ffn_left: int
    series: Series
    spans: list[Span] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)
    changes: list[tuple[float, str]] = field(default_factory=list)
    staff: list[Staff] = field(default_factory=list)


@dataclass(slots=True)
class Sums:
    """Sums over completed requests from which the moments of the load follow.

    theta = E[DP + D(D-1)/2] / E[D]; nu^2 = E[DP^2 + PD(D-1) + D(D-1)(2D-1)/6] / E[D] - theta^2
    (arXiv 2601.21351 v3, renewal-reward). Integers, so nothing is lost in long runs.
    """

    count: int = 0
    prompt: int = 0
    output: int = 0
    first: int = 0
    second: int = 0

    def add(self, p: int, d: int) -> None:
        """Counts a request with prompt p and output d."""
        self.count += 1
        self.prompt += p
        self.output += d
        pairs = d * (d - 1)
        self.first += d * p + pairs // 2
        self.second += d * p * p + p * pairs + pairs * (2 * d - 1) // 6

    def include(self, other: Sums) -> None:
        """Counts all requests of the other as well."""
        self.count += other.count
        self.prompt += other.prompt
        self.output += other.output
        self.first += other.first
        self.second += other.second

    @property
    def theta(self) -> float:
        """Context tokens per slot; nan before any output."""
        return self.first / self.output if self.output else math.nan

    @property
    def nu2(self) -> float:
        """Variance of a slot's context tokens; nan before any output."""
        return self.second / self.output - self.theta**2 if self.output else math.nan


@dataclass(slots=True)
class Tally:
    """Counts and digests over a stretch of time: the whole run, or a policy's window."""

    arrived: int = 0
    rejected: int = 0
    completed: int = 0
    replayed: int = 0
    tokens: int = 0
    completed_tokens: int = 0
    cached: int = 0
    ttft: Digest = field(default_factory=Digest)
    tpot: Digest = field(default_factory=Digest)
    itl: Digest = field(default_factory=Digest)
    e2e: Digest = field(default_factory=Digest)
    sums: Sums = field(default_factory=Sums)

    def include(self, other: Tally) -> None:
        """Counts all that the other has counted as well."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("ttft", "tpot", "itl", "e2e"):
            getattr(self, name).include(getattr(other, name))
        self.sums.include(other.sums)


_COUNTS = ("arrived", "rejected", "completed", "replayed", "tokens", "completed_tokens", "cached")


class Gauges(NamedTuple):
    """Numbers at one moment, for the series."""

    attention: int
    ffn: int
    running: int
    waiting: int


class Meter:
    """Takes note of what happens; the simulator calls it, nothing is decided here.

    Args:
        gauges: reads the present numbers of workers and requests.
        sink: gets every completed request.
        windowed: also keep a tally that ``fresh_window`` starts afresh, for a policy.
    """

    def __init__(self, gauges: Callable[[], Gauges], sink: Sink | None, windowed: bool):
        self.run = Tally()
        self.window = Tally()
        self._tallies = [self.run, self.window] if windowed else [self.run]
        self._gauges = gauges
        self._sink = sink
        self._mark: tuple[float, Callable[[], None]] = (math.inf, lambda: None)
        self._width = 0.0
        self._counts: list[list[int]] = []
        self._seen: list[Gauges] = []

    @property
    def in_flight(self) -> int:
        """Requests that arrived and are neither complete nor refused."""
        return self.run.arrived - self.run.completed - self.run.rejected

    def at_completion(self, count: int, action: Callable[[], None]) -> None:
        """Calls ``action`` once, at the end of the step that completes so many requests."""
        self._mark = (count, action)

    def begin(self) -> None:
        """All workers that are there at the start are there now."""
        self._seen[:1] = [self._gauges()]
        self._counts = self._counts or [[0, 0, 0]]

    def fresh_window(self) -> Tally:
        """The window so far; a new one begins."""
        old, self.window = self.window, Tally()
        self._tallies = [self.run, self.window]
        return old

    def arrive(self, now: float) -> None:
        """A request came."""
        for tally in self._tallies:
            tally.arrived += 1
        self._bin(now)[0] += 1

    def reject(self) -> None:
        """It was refused."""
        for tally in self._tallies:
            tally.rejected += 1

    def replay(self, count: int) -> None:
        """So many requests are started again."""
        for tally in self._tallies:
            tally.replayed += count

    def step(self, now: float, tokens: int, gap: float, repeats: int) -> None:
        """A group's step ended: ``repeats`` of its tokens came ``gap`` after the one before."""
        for tally in self._tallies:
            tally.tokens += tokens
            tally.itl.add(gap, repeats)
        self._bin(now)[2] += tokens
        if self.run.completed >= self._mark[0]:
            action = self._mark[1]
            self._mark = (math.inf, action)
            action()

    def token(self, now: float, request: Request) -> None:
        """The first token of a request, or its first in another place."""
        if request.last == request.last:  # not nan: it has emitted before
            for tally in self._tallies:
                tally.itl.add(now - request.last)
        elif request.known_start:
            request.first = now
            for tally in self._tallies:
                tally.ttft.add(now - request.arrival)

    def lone_token(self, now: float) -> None:
        """A token that prefill emitted, outside of a step."""
        for tally in self._tallies:
            tally.tokens += 1
        self._bin(now)[2] += 1

    def complete(self, now: float, request: Request, worker: int) -> None:
        """Its last token is out."""
        prompt, output, first = request.prompt, request.output, request.first
        for tally in self._tallies:
            tally.completed += 1
            tally.completed_tokens += output
            tally.cached += request.cached
            tally.sums.add(prompt, output)
            if request.known_start:
                tally.e2e.add(now - request.arrival)
                if output > 1:
                    tally.tpot.add((now - first) / (output - 1))
        self._bin(now)[1] += 1
        if self._sink:
            self._sink(
                RequestRecord(
                    number=request.index,
                    arrival=request.arrival,
                    first_token=first,
                    finished=now,
                    prompt=prompt,
                    output=output,
                    worker=worker,
                    replays=request.replays,
                )
            )

    def series(self) -> Series:
        """The series so far."""
        counts = list(zip(*self._counts, strict=True)) or [(), (), ()]
        gauges = list(zip(*self._seen, strict=True)) or [(), (), (), ()]
        return Series(self._width, *(list(column) for column in (*counts, *gauges)))

    def _bin(self, now: float) -> list[int]:
        """The bin of this moment, made when it is the first of it."""
        if not self._width:
            if not now:
                # Nothing is known of the scale of time before anything takes some.
                if not self._counts:
                    self._open()
                return self._counts[0]
            self._width = now
        while now >= BINS * self._width:
            self._halve()
        index = int(now / self._width)
        while len(self._counts) <= index:
            self._open()
        return self._counts[index]

    def _open(self) -> None:
        self._counts.append([0, 0, 0])
        self._seen.append(self._gauges())

    def _halve(self) -> None:
        self._width *= 2
        pairs = range(0, len(self._counts), 2)
        self._counts = [
            [sum(values) for values in zip(*self._counts[i : i + 2], strict=True)] for i in pairs
        ]
        self._seen = self._seen[::2]
