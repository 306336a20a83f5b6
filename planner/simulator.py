"""A cluster with attention and FFN apart, step by step: what the formulas of ``sizing`` leave out.

Discrete events, own heap. The papers' model (every lane of all attention workers waits for the
slowest, slots are refilled at once) is one setting; open arrivals, KV room, prefill, scaling and
failures are others. Not for finding the best ratio: ``sizing`` does that in microseconds, and this
checks it. Start reading at ``steps``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from planner.admission import Admission
from planner.changes import Changes
from planner.clock import Clock
from planner.control import Policy
from planner.errors import PlannerError
from planner.events import ChangeTimes, Failure, Scale
from planner.latency import Curve, Latencies, Linear
from planner.loads import Arrivals, Closed, Load
from planner.records import Gauges, Meter, RequestRecord, Result, Sink
from planner.spans import SpanLog
from planner.steps import Steps, mean

_NO_TIME = Linear(0.0, 0.0)

WINDOW = 0.8
"""Share of a closed loop's completions that its window covers (arXiv 2601.21351)."""


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Args:
        latencies: of the stages, per step.
        attention: attention workers.
        ffn: FFN workers, which share the experts: a step visits all of them.
        batch: slots of one lane on one attention worker (the papers' B).
        lanes: batches in flight per attention worker; 2 in the papers.
        boarding: "barrier": lane m of all attention workers is one frame (the papers' model);
            "asynchronous": every lane of every worker sends on its own, and a free FFN takes all
            frames of one layer that have come as one call, never waiting for more.
        steps: "independent": a lane begins its next step when its results are back, as the papers'
            batches in flight do; "joint": the lanes of a worker are one step, they end together and
            ``latencies.outside`` passes before the next one, as in afflux. Asynchronous boarding
            only.
        layers: rounds to the FFN workers per step, each taking its share of the step's times.
        imbalance: load of the FFN worker with the most work over the mean, >= 1.
        kv_tokens: KV tokens of one attention worker; a request reserves prompt + output. None: no
            limit. Open loop only.
        max_queue: most requests that wait; more are refused. None: no limit. Open loop only.
        prefill: "none": contexts appear at once; "colocated": chunks of prompts ride in the lanes'
            steps; "disaggregated": prefill workers of their own, first come first served.
        prefill_chunk: colocated: most prompt tokens in one lane's step on one worker.
        prefill_workers: disaggregated: how many.
        kv_transfer: disaggregated: time until the KV of so many tokens is at the attention worker.
        sends: "overlapped": a worker computes the next batch while it sends the last; "blocking":
            it can't begin the next one for the transfer of what it sends, t_C / 2.
        changes: how long changes of the number of workers take.

    Raises:
        PlannerError: a number is out of range, or settings contradict each other.
    """

    latencies: Latencies
    attention: int
    ffn: int = 1
    batch: int = 256
    lanes: int = 2
    boarding: Literal["barrier", "asynchronous"] = "barrier"
    steps: Literal["independent", "joint"] = "independent"
    layers: int = 1
    imbalance: float = 1.0
    kv_tokens: int | None = None
    max_queue: int | None = None
    prefill: Literal["none", "colocated", "disaggregated"] = "none"
    prefill_chunk: int = 512
    prefill_workers: int = 0
    kv_transfer: Curve = _NO_TIME
    sends: Literal["overlapped", "blocking"] = "overlapped"
    changes: ChangeTimes = field(default_factory=ChangeTimes)

    def __post_init__(self) -> None:
        for name in ("attention", "ffn", "batch", "lanes", "layers", "prefill_chunk"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PlannerError(f"{name} is {value!r}; give a whole number >= 1")
        if not 1 <= self.imbalance < math.inf:
            raise PlannerError(f"imbalance is {self.imbalance}; it is most load over mean, >= 1")
        if self.boarding not in ("barrier", "asynchronous"):
            raise PlannerError(f"boarding is {self.boarding!r}; barrier or asynchronous")
        if self.steps not in ("independent", "joint"):
            raise PlannerError(f"steps is {self.steps!r}; independent or joint")
        if self.steps == "joint" and self.boarding != "asynchronous":
            raise PlannerError("joint steps need asynchronous boarding")
        if self.steps == "independent" and self.latencies.outside != Linear(0.0, 0.0):
            raise PlannerError(
                "the latencies have time outside of the layers, which independent steps don't: "
                "take Latencies.folded(lanes), or joint steps"
            )
        if self.prefill not in ("none", "colocated", "disaggregated"):
            raise PlannerError(f"prefill is {self.prefill!r}; none, colocated or disaggregated")
        if self.sends not in ("overlapped", "blocking"):
            raise PlannerError(f"sends is {self.sends!r}; overlapped or blocking")
        if (self.prefill == "disaggregated") != (self.prefill_workers > 0):
            raise PlannerError(
                f"prefill is {self.prefill} with {self.prefill_workers} prefill workers; "
                "disaggregated prefill takes at least 1, the others take none"
            )
        if self.kv_tokens is not None and self.kv_tokens < 1:
            raise PlannerError(f"kv_tokens is {self.kv_tokens}; give at least 1, or None")
        if self.max_queue is not None and self.max_queue < 0:
            raise PlannerError(f"max_queue is {self.max_queue}; give at least 0, or None")


def simulate(
    cluster: Cluster,
    load: Load,
    *,
    seed: int = 0,
    until: float | None = None,
    events: Sequence[Scale | Failure] = (),
    policy: Policy | None = None,
    interval: float | None = None,
    window: float | None = None,
    sink: Sink | None = None,
    keep_requests: bool = False,
    spans: int = 0,
    spans_since: float = 0.0,
) -> Result:
    """Runs the load on the cluster; the same arguments give the same result to the bit.

    Args:
        cluster: what is simulated.
        load: what it is given to do: ``Closed``, ``Poisson``, ``Arrivals``, ``replay(trace)``.
        seed: of everything drawn.
        until: when to stop, in the unit of the latencies; None: when all requests are complete, or
            nothing can go on (no FFN worker is left and none will come).
        events: changes of the number of workers, and failures.
        policy: asked every ``interval`` how many workers there shall be.
        interval: time between two questions to the policy.
        window: time that its snapshots are over, fewer after a change of the workers; None: since
            the last question.
        sink: gets every completed request.
        keep_requests: return them too; takes memory per request.
        spans: steps of groups to record as spans.
        spans_since: from when on.

    Returns:
        What it came to.

    Raises:
        PlannerError: the arguments contradict each other, the load is out of range, or a curve
            doesn't cover a load that comes up.
    """
    _check(cluster, load, until, policy, interval, window)
    kept: list[RequestRecord] = []
    sinks = [s for s in (sink, kept.append if keep_requests else None) if s]

    def tell(record: RequestRecord) -> None:
        for one in sinks:
            one(record)

    clock = Clock()
    log = SpanLog(spans, spans_since)

    def gauges() -> Gauges:
        running = sum(worker.held for worker in steps.workers)
        return Gauges(len(steps.workers), steps.ffn.count, running, admission.waiting)

    meter = Meter(gauges, tell if sinks else None, windowed=policy is not None)
    steps = Steps(cluster, clock, meter, log)
    admission = Admission(cluster, load, seed, clock, steps, meter)
    changes = Changes(cluster, clock, steps, admission, meter)
    total = None
    if isinstance(load, Closed) and load.requests is not None:
        total = load.requests * cluster.attention
    share = _Window(clock, steps, meter)
    if total is not None:
        meter.at_completion(math.ceil(WINDOW * total), share.take)
    for _ in range(cluster.attention):
        changes.add_worker()
    meter.begin()
    admission.open()
    changes.schedule(events, policy, interval, window)
    clock.run(math.inf if until is None else until)
    if not share.taken:
        share.take()
    return _result(cluster, clock, steps, meter, changes, share, log, kept)


class _Window:
    """Sums at the end of the window."""

    def __init__(self, clock: Clock, steps: Steps, meter: Meter):
        self._clock, self._steps, self._meter = clock, steps, meter
        self.taken = False

    def take(self) -> None:
        """Reads them now."""
        self.taken = True
        self.length = self._clock.now
        self.work = self._steps.work()
        self.tokens = self._meter.run.tokens
        self.completed_tokens = self._meter.run.completed_tokens
        self.step_time = mean(self._steps.step_seconds, self._steps.done)


def _result(
    cluster: Cluster,
    clock: Clock,
    steps: Steps,
    meter: Meter,
    changes: Changes,
    window: _Window,
    log: SpanLog,
    kept: list[RequestRecord],
) -> Result:
    run = meter.run
    attention_busy, attention_there, ffn_busy, ffn_there = window.work
    run_busy, run_there, run_ffn_busy, run_ffn_there = steps.work()
    throughput = mean(window.tokens, window.length)
    instances = mean(attention_there + ffn_there, window.length)
    return Result(
        unit=cluster.latencies.unit,
        attention=cluster.attention,
        ffn=cluster.ffn,
        throughput=throughput,
        per_instance=mean(throughput, instances),
        throughput_completed=mean(window.completed_tokens, window.length),
        idle_attention=1 - mean(attention_busy, attention_there),
        idle_ffn=1 - mean(ffn_busy, ffn_there),
        idle_attention_run=1 - mean(run_busy, run_there),
        idle_ffn_run=1 - mean(run_ffn_busy, run_ffn_there),
        window=window.length,
        makespan=clock.now,
        steps=steps.done,
        calls=steps.ffn.calls,
        step_time=window.step_time,
        arrived=run.arrived,
        completed=run.completed,
        rejected=run.rejected,
        in_flight=meter.in_flight,
        replayed=run.replayed,
        tokens=run.tokens,
        ttft=run.ttft.percentiles(),
        tpot=run.tpot.percentiles(),
        itl=run.itl.percentiles(),
        e2e=run.e2e.percentiles(),
        theta=run.sums.theta,
        nu2=run.sums.nu2,
        attention_left=len(steps.workers),
        ffn_left=steps.ffn.count,
        series=meter.series(),
        spans=log.spans,
        requests=kept,
        changes=changes.done,
        staff=changes.staff,
    )


def _check(
    cluster: Cluster,
    load: Load,
    until: float | None,
    policy: Policy | None,
    interval: float | None,
    window: float | None,
) -> None:
    if until is not None and not until > 0:
        raise PlannerError(f"until is {until}; give a time > 0, or None")
    if (policy is None) != (interval is None) or (interval is not None and not interval > 0):
        raise PlannerError(f"interval is {interval}; give a time > 0 with a policy, else None")
    if window is not None and not (policy is not None and window > 0):
        raise PlannerError(f"window is {window}; give a time > 0 with a policy, else None")
    if isinstance(load, Closed):
        if cluster.kv_tokens is not None or cluster.max_queue is not None:
            raise PlannerError(
                "kv_tokens and max_queue are for open loops: a closed loop keeps every slot full"
            )
    elif isinstance(load, Arrivals) and load.unit not in (None, cluster.latencies.unit):
        raise PlannerError(
            f"the arrivals are in {load.unit!r} and the latencies in {cluster.latencies.unit!r}; "
            "convert the latencies with Latencies.scaled(..., unit=...)"
        )
    endless = not isinstance(load, Arrivals) and load.requests is None
    if endless and until is None:
        raise PlannerError("a load without end needs a time to stop: give until")
