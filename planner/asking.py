"""Asks a policy at intervals: makes the snapshots that it sees and hands on what it says.

Live, snapshots come from telemetry; here they come from the simulation's own meter. What the policy
wants is carried out by ``changes``.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from planner.admission import Admission
from planner.clock import Clock
from planner.control import Policy, Snapshot
from planner.records import Meter, Tally
from planner.steps import Steps, mean

if TYPE_CHECKING:
    from planner.changes import Changes
    from planner.simulator import Cluster

PATIENCE = 1000
"""Questions to a policy with nothing left to happen before the run is taken for stalled."""


class _Stretch(NamedTuple):
    """What was measured from ``since`` on until the next question; sums are as they were then."""

    since: float
    tally: Tally
    work: tuple[float, float, float, float]
    batches: tuple[int, int, int]


class Asking:
    """Asks a policy every ``interval``.

    Args:
        window: snapshots are over so much time, as in a live deployment: less at the start and
            after a change of the workers, whose measurements are not mixed. None: over what
            happened since the policy was last asked, whatever it was.
    """

    def __init__(
        self,
        policy: Policy,
        interval: float,
        window: float | None,
        cluster: Cluster,
        clock: Clock,
        steps: Steps,
        admission: Admission,
        meter: Meter,
        changes: Changes,
    ):
        self._policy = policy
        self._interval = interval
        self._window = window
        self._cluster = cluster
        self._clock = clock
        self._steps = steps
        self._admission = admission
        self._meter = meter
        self._changes = changes
        self._since = 0.0
        self._work = (0.0, 0.0, 0.0, 0.0)
        self._batches = (0, 0, 0)
        self._stretches: deque[_Stretch] = deque()
        self._patience = PATIENCE
        clock.at(interval, self._ask)

    def _ask(self, _: None) -> None:
        # With nothing else due only the policy can set things going again.
        self._patience = self._patience - 1 if self._clock.idle else PATIENCE
        target = self._policy.decide(self._snapshot())
        if target is not None:
            self._changes.set_target(target)
        if self._patience or not self._clock.idle:
            self._clock.at(self._clock.now + self._interval, self._ask)

    def _measured(self) -> _Stretch:
        """All that counts for this snapshot as one stretch; a new one begins."""
        now, steps = self._clock.now, self._steps
        totals = (steps.batches, steps.batch_requests, steps.batch_tokens)
        tally = self._meter.fresh_window()
        newest = _Stretch(self._since, tally, self._work, self._batches)
        self._since, self._work, self._batches = now, steps.work(), totals
        if self._window is None:
            return newest
        kept = self._stretches
        kept.append(newest)
        # Stretches are whole intervals: sums of floats must not cost the oldest one.
        oldest = max(now - self._window - self._interval / 2, self._changes.changed)
        while kept and kept[0].since < oldest:
            kept.popleft()
        if not kept:
            return _Stretch(now, Tally(), self._work, self._batches)
        whole = Tally()
        for stretch in kept:
            whole.include(stretch.tally)
        return kept[0]._replace(tally=whole)

    def _snapshot(self) -> Snapshot:
        now, steps, changes = self._clock.now, self._steps, self._changes
        since, tally, work, batches_then = self._measured()
        window = now - since
        attention_busy, attention_there, ffn_busy, ffn_there = (
            new - old for new, old in zip(self._work, work, strict=True)
        )
        batches, requests, tokens = (
            new - old for new, old in zip(self._batches, batches_then, strict=True)
        )
        return Snapshot(
            now=now,
            window=window,
            attention=changes.attention,
            ffn=steps.ffn.count,
            attention_preparing=changes.attention_preparing,
            attention_draining=len(steps.workers) - changes.attention,
            ffn_preparing=changes.ffn_preparing,
            running=sum(worker.held for worker in steps.workers),
            waiting=self._admission.waiting,
            arrival_rate=tally.arrived / window if window else 0.0,
            rejected=tally.rejected,
            tokens_rate=tally.tokens / window if window else 0.0,
            completed=tally.completed,
            ttft=tally.ttft.percentiles(),
            tpot=tally.tpot.percentiles(),
            itl=tally.itl.percentiles(),
            attention_busy=mean(attention_busy, attention_there),
            ffn_busy=mean(ffn_busy, ffn_there),
            batch=mean(requests, batches),
            kv_tokens=mean(tokens, batches),
            theta=tally.sums.theta,
            nu2=tally.sums.nu2,
            prompt_mean=mean(tally.sums.prompt, tally.sums.count),
            output_mean=mean(tally.sums.output, tally.sums.count),
            prefix_hit=mean(tally.cached, tally.sums.prompt),
            kv_usage=self._kv_usage(),
            imbalance=self._cluster.imbalance,
        )

    def _kv_usage(self) -> float:
        """Share of the room that requests have reserved; nan where there is no end of it."""
        room, workers = self._cluster.kv_tokens, self._steps.workers
        if room is None or not workers:
            return math.nan
        return sum(worker.reserved for worker in workers) / (room * len(workers))
