"""The best fixed numbers of workers for requests that are known: what a policy is compared with.

Simulates fixed numbers from the cheapest on, until some hold the targets nearly as well as any
could. Nobody has this hindsight in operation. For all of the time, or for every hour by itself:
the first is what a policy should beat, the second about the best it could come to. Not for
policies: see ``replay``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from autoscaler.limits import Counts, Limits, nearest
from autoscaler.pooling import Ask, sharing
from autoscaler.replay import Hopeless, Outcome, Scenario, run
from planner.kept import Kept
from planner.traces import Trace

NEARLY = 0.99
"""Share of the best attainment that counts as held."""

_BUSY = 8  # the busiest eighth of the time sorts out what is too few

Progress = Callable[[str, float], None]

_OUTCOME = TypeAdapter(Outcome)


@dataclass(frozen=True)
class Hindsight:
    """The best fixed numbers of workers.

    Args:
        counts: workers.
        outcome: what they come to.
        most: attainment of the best of all numbers within the limits.
        tried: attainment of all numbers that were simulated to the end.
        dropped: numbers that were given up on the way.
    """

    counts: Counts
    outcome: Outcome
    most: float
    tried: dict[Counts, float]
    dropped: list[Counts]


@dataclass(frozen=True)
class Timetable:
    """The best fixed numbers of every period, each begun empty.

    Args:
        period: seconds.
        counts: workers, by period.
        attainment: share of all requests within the targets.
        actor_seconds: weighted as the limits say; starting and stopping takes none.
    """

    period: float
    counts: list[Counts]
    attainment: float
    actor_seconds: float


def best_timetable(
    scenario: Scenario,
    period: float,
    *,
    most: float,
    jobs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> Timetable:
    """``best_static`` of every period by itself: changes at the right moment that cost nothing.

    Args:
        period: seconds; periods without requests take the least that the limits allow.
        most: attainment of the best of all numbers.
        kept: as ``best_static``'s, and may be the same.
    """
    tell = progress or (lambda text, share: None)
    done = kept or Kept(None, "")
    arrival, limits = scenario.trace.arrival, scenario.limits
    count = max(1, math.ceil(float(arrival[-1]) / period))
    edges = np.searchsorted(arrival, period * np.arange(count + 1))
    edges[-1] = len(arrival)
    units = [f"period {number} of {period!r} s, {most!r}" for number in range(count)]
    todo = [number for number, unit in enumerate(units) if done.get(unit) is None]
    with sharing((scenario, most, seed), jobs) as ask:
        questions = [(int(edges[number]), int(edges[number + 1])) for number in todo]
        for number, found in zip(todo, ask(_best_part, questions), strict=True):
            done.put(units[number], found)
            tell(f"period {number + 1} of {count}", (number + 1) / count)
    found = [done.get(unit) for unit in units]
    counts = [Counts(*one["counts"]) for one in found]
    sizes = np.diff(edges)
    return Timetable(
        period,
        counts,
        float(np.average([one["attainment"] for one in found], weights=sizes)),
        sum(
            _cost(each, limits) * min(period, float(arrival[-1]) - number * period)
            for number, each in enumerate(counts)
        ),
    )


def _best_part(shared: tuple[Scenario, float, int], ends: tuple[int, int]) -> dict[str, Any]:
    scenario, most, seed = shared
    first, end = ends
    if first == end:
        least = Counts(scenario.limits.attention[0], scenario.limits.ffn[0])
        return {"counts": list(nearest(least, scenario.limits)), "attainment": 1.0}
    found = best_static(_part(scenario, first, end), jobs=1, seed=seed, most=most)
    return {"counts": list(found.counts), "attainment": found.outcome.attainment}


def best_static(
    scenario: Scenario,
    *,
    jobs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    kept: Kept | None = None,
    most: float | None = None,
) -> Hindsight:
    """The fewest actor-seconds of fixed numbers that reach ``NEARLY`` of the best attainment.

    All numbers within the limits are asked, the cheapest first (by the limits' weights), so nothing
    is assumed of how attainment depends on them; only the best attainment of all is taken to be
    that of numbers to which no worker can be added. Of equally cheap ones the best is chosen.
    Numbers that miss too much in the busiest eighth of the time, begun empty, are not tried on the
    rest.

    Args:
        jobs: processes; None: one per core.
        progress: is told what is being done, and the share that is over, as far as known.
        kept: simulations of the same scenario and seed that were finished earlier; gets the others.
        most: attainment of the best of all numbers, where it is known; None: found out.

    Raises:
        PlannerError: as ``run``; or jobs below 1.
    """
    tell = progress or (lambda text, share: None)
    done = kept or Kept(None, "")
    limits = scenario.limits
    every = [
        Counts(a, f)
        for a in range(limits.attention[0], limits.attention[1] + 1)
        for f in range(limits.ffn[0], limits.ffn[1] + 1)
        if limits.allow(Counts(a, f))
    ]
    with sharing((scenario, seed), jobs) as ask:
        tried: dict[Counts, float] = {}
        dropped: list[Counts] = []
        best: dict[Counts, Outcome] = {}
        if most is None:
            tell("the most that the limits allow", 0.0)
            largest = [(c, 0.0, False) for c in every if _maximal(c, limits)]
            for counts, outcome in _ask_rest(ask, largest, done):
                assert outcome is not None
                tried[counts] = outcome.attainment
                best[counts] = outcome
            most = max(tried.values())
        least = NEARLY * most
        dearest = max(_cost(c, limits) for c in every)
        rest = sorted((c for c in every if c not in tried), key=lambda c: _cost(c, limits))
        for cost, level in groupby(rest, key=lambda c: _cost(c, limits)):
            hopeful = list(level)
            tell(f"{hopeful[0]} to {hopeful[-1]}", min(0.95, cost / dearest))
            for part in (True, False):
                found = _ask_rest(ask, [(c, least, part) for c in hopeful], done)
                dropped += [c for c, outcome in found if outcome is None]
                hopeful = [c for c, outcome in found if outcome is not None]
            for counts, outcome in found:
                if outcome is not None:
                    tried[counts] = outcome.attainment
                    best[counts] = outcome
            if any(tried[c] >= least for c in hopeful):
                break
    held = [c for c in tried if tried[c] >= least]
    if not held:  # less can be had here than was said
        return best_static(scenario, jobs=jobs, seed=seed, progress=progress, kept=kept)
    chosen = min(held, key=lambda c: (_cost(c, limits), -tried[c]))
    return Hindsight(chosen, best[chosen], most, tried, dropped)


def busiest(trace: Trace, parts: int) -> tuple[int, int]:
    """First and last (exclusive) request of the busiest ``1/parts`` of a trace's time."""
    width = float(trace.arrival[-1]) / parts
    ends = np.searchsorted(trace.arrival, trace.arrival + width, side="right")
    first = int(np.argmax(ends - np.arange(len(trace))))
    return first, int(ends[first])


def _cost(counts: Counts, limits: Limits) -> float:
    return counts.attention * limits.weight_attention + counts.ffn * limits.weight_ffn


def _maximal(counts: Counts, limits: Limits) -> bool:
    more = (
        counts._replace(attention=counts.attention + 1),
        counts._replace(ffn=counts.ffn + 1),
    )
    return not any(limits.allow(one) for one in more)


def _cut(scenario: Scenario, least: float) -> tuple[Scenario, float]:
    """The busiest part, and the attainment without which the whole can't have ``least``."""
    first, end = busiest(scenario.trace, _BUSY)
    spare = (1.0 - least) * len(scenario.trace)
    return _part(scenario, first, end), max(0.0, 1.0 - spare / (end - first))


def _part(scenario: Scenario, first: int, end: int) -> Scenario:
    """Some of the requests, the first of them at 0."""
    trace = scenario.trace
    arrival = trace.arrival[first:end]
    part = Trace(arrival - arrival[0], trace.prompt[first:end], trace.output[first:end])
    cached = None if scenario.cached is None else scenario.cached[first:end]
    return replace(scenario, trace=part, cached=cached)


Question = tuple[Counts, float, bool]
"""Numbers, attainment without which they are hopeless, whether on the busiest part only."""


def _ask_rest(
    ask: Ask, questions: Sequence[Question], kept: Kept
) -> list[tuple[Counts, Outcome | None]]:
    """Answers in the order of the questions; those kept are not asked again."""
    units = [f"{counts}, {least!r}, {part}" for counts, least, part in questions]
    todo = [index for index, unit in enumerate(units) if kept.get(unit) is None]
    for index, (_, outcome) in zip(todo, ask(_answer, [questions[i] for i in todo]), strict=True):
        kept.put(units[index], "hopeless" if outcome is None else outcome_data(outcome))
    found = (kept.get(unit) for unit in units)
    return [
        (question[0], None if data == "hopeless" else read_outcome(data))
        for question, data in zip(questions, found, strict=True)
    ]


def outcome_data(outcome: Outcome) -> Any:
    """For JSON."""
    return _OUTCOME.dump_python(outcome)  # mode "json" would make null of nan


def read_outcome(data: Any) -> Outcome:
    """What ``outcome_data`` wrote."""
    return _OUTCOME.validate_python(data)


def _answer(shared: tuple[Scenario, int], question: Question) -> tuple[Counts, Outcome | None]:
    scenario, seed = shared
    counts, least, part = question
    if part:
        scenario, least = _cut(scenario, least)
    try:
        return counts, run(scenario.starting_with(*counts), None, seed=seed, hopeless=least)
    except Hopeless:
        return counts, None
