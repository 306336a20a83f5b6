"""What became of a scenario: which requests were answered within the targets, and what changed.

Pure functions over the streams of a load and the changes of a deployment. A request that failed, or
was not answered in full by the end of the run, missed its targets.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.load import Stream
from benchmarks.open_load import ENDED
from benchmarks.scenarios import Scenario


@dataclass(frozen=True)
class Targets:
    """Seconds that a request's first token, and each further one on average, may take."""

    ttft_s: float
    tpot_s: float

    def met(self, ttft: float, tpot: float, output: int) -> bool:
        """Whether a complete answer of ``output`` tokens is within both; nan never is."""
        return ttft <= self.ttft_s and (output == 1 or tpot <= self.tpot_s)


@dataclass(frozen=True)
class Outcome:
    """One request, judged.

    Args:
        at: seconds from the start of the scenario at which it was to be sent.
        phase: number of its phase.
        ttft, tpot: seconds; nan where it never came that far.
        ended: seconds from the start of the scenario; nan if it was never sent.
        complete: every token came.
        lost: the deployment failed it: an error, or a stream that ended early. Not what was broken
            off at the end of the run.
        met: complete and within both targets.
        error: what the client was told, or saw, of one that is not complete.
    """

    at: float
    phase: int
    ttft: float
    tpot: float
    ended: float
    complete: bool
    lost: bool
    met: bool
    error: str = ""


@dataclass(frozen=True)
class Change:
    """A change of the numbers of actors: ``at`` seconds from the start of the scenario."""

    at: float
    attention: int
    ffn: int
    took_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.attention}A{self.ffn}F"


def judge(
    scenario: Scenario, streams: Sequence[Stream], targets: Targets, began: float
) -> list[Outcome]:
    """An outcome for every request of the scenario, in its order.

    Args:
        streams: what the load returned; a request without one was never sent.
        began: Unix time of the start of the scenario.
    """
    by_place = {stream.asked: stream for stream in streams}
    outcomes = []
    for place, request in enumerate(scenario.asked):
        phase = scenario.phase_at(request.at)
        stream = by_place.get(place)
        if stream is None:
            nan = math.nan
            outcomes.append(Outcome(request.at, phase, nan, nan, nan, False, False, False))
            continue
        times = stream.times
        # From when it was due: a load generator that is late must not look like a quick answer.
        due = min(stream.sent, began + request.at)
        ttft = times[0] - due if times else math.nan
        tpot = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else math.nan
        complete = not stream.error
        outcomes.append(
            Outcome(
                at=request.at,
                phase=phase,
                ttft=ttft,
                tpot=tpot,
                ended=stream.ended - began,
                complete=complete,
                lost=bool(stream.error) and stream.error != ENDED,
                met=complete and targets.met(ttft, tpot, request.output),
                error=stream.error,
            )
        )
    return outcomes


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, attainment and latencies (seconds) of some requests; nan where there are none."""
    complete = [outcome for outcome in outcomes if outcome.complete]
    lost = sum(outcome.lost for outcome in outcomes)
    return {
        "requests": len(outcomes),
        "completed": len(complete),
        "lost": lost,
        "unfinished": len(outcomes) - len(complete) - lost,
        "attainment": attainment(outcomes),
        "ttft_p50_s": _rank([o.ttft for o in complete], 50),
        "ttft_p90_s": _rank([o.ttft for o in complete], 90),
        "tpot_p50_s": _rank([o.tpot for o in complete], 50),
        "tpot_p90_s": _rank([o.tpot for o in complete], 90),
    }


def throughput(scenario: Scenario, outcomes: Sequence[Outcome]) -> float:
    """Output tokens per second of complete answers, from the start until the last; nan without."""
    done = [
        (asked.output, outcome.ended)
        for asked, outcome in zip(scenario.asked, outcomes, strict=True)
        if outcome.complete
    ]
    if not done:
        return math.nan
    return round(sum(tokens for tokens, _ in done) / max(ended for _, ended in done), 2)


def attainment(outcomes: Sequence[Outcome]) -> float:
    """Share of requests that met both targets; nan without any."""
    if not outcomes:
        return math.nan
    return round(sum(outcome.met for outcome in outcomes) / len(outcomes), 4)


def tpot_over_time(
    outcomes: Sequence[Outcome], seconds: float, step_s: float = 2.0, percent: float = 90.0
) -> tuple[np.ndarray, np.ndarray]:
    """A percentile of TPOT by the time of arrival: (middles of the steps, seconds), both [steps];
    nan where nothing arrived. A request that was not completed counts as endless."""
    steps = max(1, math.ceil(seconds / step_s))
    found: list[list[float]] = [[] for _ in range(steps)]
    for outcome in outcomes:
        place = min(int(outcome.at / step_s), steps - 1)
        value = outcome.tpot if outcome.complete else math.inf
        if not math.isnan(value):
            found[place].append(value)
    values = [
        float(np.percentile(row, percent, method="lower")) if row else math.nan for row in found
    ]
    return (np.arange(steps) + 0.5) * step_s, np.array(values)


def changes_by_phase(scenario: Scenario, changes: Sequence[Change]) -> list[int]:
    """How many changes were made in each phase; what came after the end counts for the last."""
    counted = Counter(scenario.phase_at(change.at) for change in changes)
    return [counted[phase] for phase in range(len(scenario.phases))]


def reversals(scenario: Scenario, begin: int, changes: Sequence[Change]) -> int:
    """Oscillation: how often, within one phase, attention went the other way than the time before.

    Args:
        begin: attention actors at the start of the scenario.
    """
    turned, before, last = 0, begin, (-1, 0)
    for change in changes:
        phase = scenario.phase_at(change.at)
        way = int(np.sign(change.attention - before))
        if way:
            turned += last == (phase, -way)
            last = (phase, way)
        before = change.attention
    return turned


def _rank(values: Sequence[float], percent: float) -> float:
    known = [value for value in values if not math.isnan(value)]
    return round(float(np.percentile(known, percent)), 4) if known else math.nan
