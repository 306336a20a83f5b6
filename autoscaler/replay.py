"""Replays requests through the planner's simulator under a policy, and says what it came to.

The requests are a trace's or a recording's, the stage times a calibrated model's. For pictures see
``replay_plots``, for a search over parameters ``tune``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoscaler.core import Core, Timing
from autoscaler.limits import Limits
from autoscaler.model import Model
from autoscaler.policy import SLO, Decision, Policy, System
from autoscaler.reasons import Reason
from autoscaler.simulated import Simulated
from planner.latency import Latencies
from planner.loads import replay as arrivals_of
from planner.records import RequestRecord
from planner.simulator import Cluster, simulate
from planner.staff import Staff, worker_time
from planner.traces import Trace

BINS = 288
"""Bins of the series over time: five minutes each of a day."""

BACK_WITHIN = 600.0
"""A role that changes direction within so much time has been reversed: the last change was for
nothing."""

_WORST = 5  # windows that are named
_LOOK = 100  # requests from one look for hopelessness to the next
_FEW = 5  # requests in a window below which its share says nothing


class Hopeless(Exception):
    """The attainment that was asked for can't be reached any more."""


@dataclass(frozen=True)
class Scenario:
    """What a policy has to cope with. Times are in the unit of the cluster's latencies.

    Args:
        cluster: what is simulated; its numbers of workers are those at the start.
        trace: the requests; arrival times in the same unit.
        slo, limits, timing: what the core decides with.
        window: time that its snapshots are over.
        cached: prompt tokens of each request that a prefix cache holds; None: none.
        believed: stage times that the policy is told; None: those of the simulation.
        wall: Unix time of the first arrival, for policies that know the time of day.
        grace: time after the last arrival at which what is still unfinished counts as missed.
    """

    cluster: Cluster
    trace: Trace
    slo: SLO
    limits: Limits
    timing: Timing = field(default_factory=Timing)
    window: float = 20.0
    cached: Sequence[int] | NDArray[np.int64] | None = None
    believed: Latencies | None = None
    wall: float = 0.0
    grace: float = 300.0

    @property
    def system(self) -> System:
        """The cluster as policies are told of it."""
        cluster = self.cluster
        return System(cluster.batch * cluster.lanes, cluster.kv_tokens, cluster.lanes)

    def starting_with(self, attention: int, ffn: int) -> Scenario:
        """The same with other numbers of workers at the start."""
        return replace(self, cluster=replace(self.cluster, attention=attention, ffn=ffn))


@dataclass(frozen=True)
class Window:
    """A bin of the series: requests that arrived in it and what became of them.

    Args:
        at: when it begins.
        requests: that arrived; ``rate`` per unit of time.
        attainment: share of them within both targets; nan without any.
        ttft_p90, tpot_p90: over those that were served; nan without any.
    """

    at: float
    requests: int
    rate: float
    attainment: float
    ttft_p90: float
    tpot_p90: float


@dataclass(frozen=True)
class Outcome:
    """What a replay came to.

    Args:
        requests: that arrived.
        attainment: share within both targets; refused and unfinished ones count as missed.
        ttft_met, tpot_met: share within one of them.
        rejected, unfinished: how many.
        attention_seconds, ffn_seconds: workers times time until the last arrival; starting and
            draining ones count.
        actor_seconds: both together, by the weights of the limits.
        horizon: time of the last arrival; means per time are over it.
        changes: targets that were set.
        reversals: changes that took a role back within ``BACK_WITHIN``.
        turns_per_hour: changes of direction per 3600 units of time, over both roles.
        ttft_p50, ttft_p90, ttft_p99, tpot_p50, tpot_p90, tpot_p99: of what was served, exact.
        staff: workers over time.
        windows: the series; of equal width.
        worst: the windows with the least attainment, the worst first.
        decisions: one per tick; empty without a policy.
        reasons: how many ticks each reason decided.
    """

    requests: int
    attainment: float
    ttft_met: float
    tpot_met: float
    rejected: int
    unfinished: int
    attention_seconds: float
    ffn_seconds: float
    actor_seconds: float
    horizon: float
    changes: int
    reversals: int
    turns_per_hour: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p90: float
    tpot_p99: float
    staff: Sequence[Staff]
    windows: Sequence[Window]
    worst: Sequence[Window]
    decisions: Sequence[Decision]
    reasons: dict[Reason, int]


def run(
    scenario: Scenario,
    policy: Policy | None,
    *,
    seed: int = 0,
    bins: int | None = None,
    hopeless: float = 0.0,
) -> Outcome:
    """Replays the scenario under a policy, or with the workers of the start throughout.

    Args:
        policy: decides through a ``Core``; None: nobody does.
        seed: of the simulation.
        bins: of the series; None: as many as the requests can fill, at most ``BINS``.
        hopeless: give up once the attainment can no longer reach this share.

    Raises:
        Hopeless: it can't.
        PlannerError: the cluster can't be simulated with these latencies or this trace.
    """
    watcher = _Watcher(scenario, hopeless)
    simulated = None if policy is None else Simulated(*_core(scenario, policy), scenario.wall)
    horizon = float(scenario.trace.arrival[-1])
    interval = scenario.timing.interval
    result = simulate(
        scenario.cluster,
        arrivals_of(scenario.trace, scenario.cached),
        seed=seed,
        until=horizon + scenario.grace,
        policy=simulated,
        interval=None if simulated is None else interval,
        window=None if simulated is None else max(scenario.window, interval),
        sink=watcher.take,
    )
    staff = result.staff
    weights = scenario.limits
    attention, ffn = worker_time(staff, horizon)
    decisions = [] if simulated is None else simulated.decisions
    if bins is None:
        bins = min(BINS, max(12, len(scenario.trace) // 40))
    windows = watcher.windows(horizon, bins)
    reversals, turns = oscillation(decisions)
    return Outcome(
        requests=len(scenario.trace),
        **watcher.shares(),
        rejected=result.rejected,
        unfinished=result.in_flight,
        attention_seconds=attention,
        ffn_seconds=ffn,
        actor_seconds=attention * weights.weight_attention + ffn * weights.weight_ffn,
        horizon=horizon,
        changes=sum(decision.target is not None for decision in decisions),
        reversals=reversals,
        turns_per_hour=turns / horizon * 3600.0 if horizon else 0.0,
        **watcher.percentiles(),
        staff=staff,
        windows=windows,
        worst=worst(windows),
        decisions=decisions,
        reasons=dict(Counter(d.reasons[0] for d in decisions if d.reasons).most_common()),
    )


def figures(outcome: Outcome) -> dict[str, Any]:
    """The numbers of an outcome, flat, for JSON."""
    plain = (int, float)
    return {key: value for key, value in vars(outcome).items() if isinstance(value, plain)}


def series(outcome: Outcome) -> dict[str, Any]:
    """What happened over time, for JSON: windows, workers and the changes with their reasons."""
    return {
        "windows": [asdict(window) for window in outcome.windows],
        "staff": [entry._asdict() for entry in outcome.staff],
        "changes": [
            {
                "at": decision.at,
                "there": str(decision.there),
                "target": str(decision.target),
                "reasons": [str(reason) for reason in decision.reasons],
                "detail": decision.detail,
            }
            for decision in outcome.decisions
            if decision.target is not None
        ],
        "reasons": {str(reason): count for reason, count in outcome.reasons.items()},
    }


def oscillation(decisions: Sequence[Decision], within: float = BACK_WITHIN) -> tuple[int, int]:
    """How often a role changed direction: within so much time of its last change, and at all."""
    last: dict[str, tuple[float, bool]] = {}
    reversals = turns = 0
    for decision in decisions:
        if decision.target is None:
            continue
        for role in ("attention", "ffn"):
            old, new = getattr(decision.there, role), getattr(decision.target, role)
            if new == old:
                continue
            at, up = last.get(role, (-math.inf, new > old))
            if up != (new > old):
                turns += 1
                reversals += decision.at - at <= within
            last[role] = (decision.at, new > old)
    return reversals, turns


def worst(windows: Sequence[Window], count: int = _WORST) -> list[Window]:
    """The windows with the least attainment; those with very few requests are left out."""
    missed = [w for w in windows if w.requests >= _FEW and w.attainment < 1.0]
    return sorted(missed, key=lambda window: (window.attainment, window.at))[:count]


class _Watcher:
    """Takes note of every completed request, by its number in the trace."""

    def __init__(self, scenario: Scenario, hopeless: float):
        trace, slo = scenario.trace, scenario.slo
        count = len(trace)
        self._arrival = trace.arrival
        self._slo = slo
        self._ttft = np.full(count, np.nan)
        self._tpot = np.full(count, np.nan)
        self._good = np.zeros(count, dtype=np.bool_)
        self._spare = (1.0 - hopeless) * count
        self._late = slo.ttft + slo.tpot * float(np.max(trace.output))
        self._hopeful = hopeless > 0.0
        self._taken = 0

    def take(self, record: RequestRecord) -> None:
        ttft = record.first_token - record.arrival
        tpot = 0.0
        if record.output > 1:
            tpot = (record.finished - record.first_token) / (record.output - 1)
        self._ttft[record.number] = ttft
        self._tpot[record.number] = tpot
        self._good[record.number] = ttft <= self._slo.ttft and tpot <= self._slo.tpot
        self._taken += 1
        if self._hopeful and self._taken % _LOOK == 0:
            # Whoever came before this and is not served well by now has missed.
            due = int(np.searchsorted(self._arrival, record.finished - self._late))
            if due - np.count_nonzero(self._good[:due]) > self._spare:
                raise Hopeless

    def shares(self) -> dict[str, float]:
        return {
            "attainment": float(np.mean(self._good)),
            "ttft_met": float(np.mean(self._ttft <= self._slo.ttft)),
            "tpot_met": float(np.mean(self._tpot <= self._slo.tpot)),
        }

    def percentiles(self) -> dict[str, float]:
        found = {}
        for name, values in (("ttft", self._ttft), ("tpot", self._tpot)):
            for share in (50, 90, 99):
                found[f"{name}_p{share}"] = _percentile(values, share)
        return found

    def windows(self, horizon: float, bins: int) -> list[Window]:
        width = horizon / bins if horizon else 1.0
        place = np.minimum((self._arrival / width).astype(np.int64), bins - 1)
        edges = np.searchsorted(place, np.arange(bins + 1))
        windows = []
        for index, (start, end) in enumerate(pairwise(edges)):
            count = int(end - start)
            windows.append(
                Window(
                    at=index * width,
                    requests=count,
                    rate=count / width,
                    attainment=float(np.mean(self._good[start:end])) if count else math.nan,
                    ttft_p90=_percentile(self._ttft[start:end], 90),
                    tpot_p90=_percentile(self._tpot[start:end], 90),
                )
            )
        return windows


def _core(scenario: Scenario, policy: Policy) -> tuple[Core, Model]:
    cluster = scenario.cluster
    latencies = cluster.latencies if scenario.believed is None else scenario.believed
    core = Core(policy, scenario.limits, scenario.slo, scenario.system, scenario.timing)
    return core, Model(latencies, lanes=cluster.lanes, layers=cluster.layers)


def _percentile(values: NDArray[np.float64], share: float) -> float:
    served = values[~np.isnan(values)]
    return float(np.percentile(served, share)) if len(served) else math.nan
