"""What a simulated cluster is given to do: a closed loop, Poisson arrivals, or recorded arrivals.

Requests are drawn in blocks as they are needed, so a load of millions takes no memory. Not for
the length distributions, which are in ``workload``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from planner.errors import PlannerError

_BLOCK = 4096


class Lengths(Protocol):
    """The part of ``planner.workload.Workload`` that a simulation draws from."""

    @property
    def reuse(self) -> float:
        """Mean share of prompt tokens found in a prefix cache, 0..1."""
        ...

    def sample(self, rng: np.random.Generator, n: int) -> tuple[Any, Any]:
        """Prompt and output lengths, int64[n] each, outputs >= 1."""
        ...


class Arrival(NamedTuple):
    """A request and when it comes.

    Args:
        time: of its arrival, in the unit of the latencies, from the start of the simulation.
        prompt: tokens.
        output: tokens that it will emit, >= 1.
        cached: prompt tokens that a prefix cache holds, so prefill skips them.
    """

    time: float
    prompt: int
    output: int
    cached: int = 0


@dataclass(frozen=True)
class Closed:
    """Every slot is refilled the moment it becomes free (the model of arXiv 2601.21351).

    Args:
        workload: where lengths are drawn from; worker j draws the same ones however many workers
            there are, so runs with other numbers of workers are compared on common requests.
        requests: how many each attention worker starts; None: without end, so give ``until``.
        stationary: start in the middle: slots hold requests as a random moment of a long run finds
            them (length drawn in proportion to itself, age uniform). Otherwise all are new.
    """

    workload: Lengths
    requests: int | None
    stationary: bool = False

    def __post_init__(self) -> None:
        _check_count(self.requests)


@dataclass(frozen=True)
class Poisson:
    """Arrivals that know nothing of each other, at a rate.

    Args:
        workload: where lengths are drawn from.
        rate: requests per unit of time; or steps of (time from which on, rate), the first at 0.
        requests: how many arrive; None: without end, so give ``until``.
    """

    workload: Lengths
    rate: float | Sequence[tuple[float, float]]
    requests: int | None

    def __post_init__(self) -> None:
        _check_count(self.requests)
        steps = self.steps
        times = [time for time, _ in steps]
        if not times or times[0] != 0 or times != sorted(set(times)):
            raise PlannerError(f"rate steps at times {times}; the first must be 0, the rest rising")
        if any(not 0 <= rate < math.inf for _, rate in steps) or not any(r for _, r in steps):
            raise PlannerError(f"rates {[r for _, r in steps]}; give finite rates >= 0, one above")

    @property
    def steps(self) -> list[tuple[float, float]]:
        """The rate as steps of (time from which on, rate)."""
        if isinstance(self.rate, (int, float)):
            return [(0.0, float(self.rate))]
        return [(float(time), float(rate)) for time, rate in self.rate]


@dataclass(frozen=True)
class Arrivals:
    """Recorded or made-up arrivals, read one by one, times not falling.

    ``unit`` names the unit of the times where it is known: a simulation whose latencies have
    another one refuses it.
    """

    items: Iterable[Arrival]
    unit: str | None = field(default=None, kw_only=True)


Load = Closed | Poisson | Arrivals


class TraceLike(Protocol):
    """The part of ``planner.traces.Trace`` that a replay needs: equally long arrays."""

    @property
    def arrival(self) -> Any:
        """Seconds from the first request."""
        ...

    @property
    def prompt(self) -> Any:
        """Tokens."""
        ...

    @property
    def output(self) -> Any:
        """Tokens."""
        ...


def replay(trace: TraceLike, cached: Sequence[int] | Any | None = None) -> Arrivals:
    """A trace as arrivals, in seconds; requests that emit nothing are left out.

    Args:
        trace: what ``planner.traces.read_trace`` returns.
        cached: prompt tokens of each request that a prefix cache holds
            (``planner.traces.prefix_reuse``); none when left out.

    Raises:
        PlannerError: ``cached`` isn't as long as the trace.
    """
    count = len(trace.arrival)
    if cached is not None and len(cached) != count:
        raise PlannerError(f"{len(cached)} counts of cached tokens for a trace of {count} requests")
    held = np.zeros(count, dtype=np.int64) if cached is None else cached

    class Items:
        def __iter__(self) -> Iterator[Arrival]:
            rows = zip(trace.arrival, trace.prompt, trace.output, held, strict=True)
            for time, prompt, output, hit in rows:
                if output >= 1:
                    yield Arrival(float(time), int(prompt), int(output), int(hit))

    return Arrivals(Items(), unit="s")


class Draw(NamedTuple):
    """The lengths of one request; ``age`` tokens of the output are already there."""

    prompt: int
    output: int
    cached: int = 0
    age: int = 0


def draws(workload: Lengths, seed: int, stream: int, limit: int | None) -> Iterator[Draw]:
    """Up to ``limit`` requests of one stream; the same ones for the same seed and stream."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, stream)))
    left = math.inf if limit is None else limit
    reuse = workload.reuse
    while left > 0:
        # Always whole blocks: the first requests of a longer run are those of a shorter one.
        prompts, outputs = workload.sample(rng, _BLOCK)
        block = zip(np.asarray(prompts).tolist(), np.asarray(outputs).tolist(), strict=True)
        for prompt, output in block:
            if left <= 0:
                return
            left -= 1
            if output < 1 or prompt < 0:
                raise PlannerError(
                    f"the workload drew a prompt of {prompt} and an output of {output} tokens; "
                    "prompts are >= 0 and outputs >= 1"
                )
            yield Draw(prompt, output, int(prompt * reuse))


def stationary_draws(workload: Lengths, seed: int, stream: int, count: int) -> list[Draw]:
    """Requests as a random moment of a long closed run finds them in ``count`` slots.

    A request of length D is found in proportion to D, at an age uniform on 0..D-1 (renewal
    theory; arXiv 2601.21351 v3 takes its moments).
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, stream)))
    prompts, outputs = (np.asarray(v) for v in workload.sample(rng, max(_BLOCK, 16 * count)))
    chosen = rng.choice(len(outputs), size=count, p=outputs / outputs.sum())
    ages = (rng.random(count) * outputs[chosen]).astype(np.int64)
    rows = zip(prompts[chosen].tolist(), outputs[chosen].tolist(), ages.tolist(), strict=True)
    return [Draw(p, d, int(p * workload.reuse), age) for p, d, age in rows]


def poisson_arrivals(load: Poisson, seed: int) -> Iterator[Arrival]:
    """The arrivals of a Poisson load, drawn as they are asked for."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    steps = load.steps
    ends = [time for time, _ in steps[1:]] + [math.inf]
    lengths = draws(load.workload, seed, 0, load.requests)
    index, now = 0, 0.0
    while True:
        for gap in rng.exponential(size=_BLOCK).tolist():
            # ``gap`` is work for the rate to do; it may take several of its steps to do it.
            while gap > (ends[index] - now) * steps[index][1] or not steps[index][1]:
                if ends[index] == math.inf:
                    return
                gap -= (ends[index] - now) * steps[index][1]
                now = ends[index]
                index += 1
            now += gap / steps[index][1]
            draw = next(lengths, None)
            if draw is None:
                return
            yield Arrival(now, draw.prompt, draw.output, draw.cached)


def _check_count(requests: int | None) -> None:
    if requests is not None and requests < 1:
        raise PlannerError(f"{requests} requests; give at least 1, or None for no end")
