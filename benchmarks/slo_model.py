"""The same scenario in the planner's simulator, on the same emulated devices, with the same policy.

How the devices and rates of ``bench slo`` were chosen, and what stands beside the measured figures.
The mapping is that of ``replay``: asynchronous boarding, joint steps, prefill in the decode steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.checkpoint import Checkpoint
from autoscaler.model import Model
from autoscaler.priors import prior_of
from autoscaler.settings import make_core, system_of
from autoscaler.simulated import Simulated
from benchmarks.attainment import Change, Outcome, Targets
from benchmarks.scenarios import Scenario, as_arrivals
from benchmarks.slo_runs import Run
from cluster.placement import Rules, imbalance, initial_table
from cluster.spec import ClusterSpec
from planner.curves import Linear
from planner.events import ChangeTimes, Scale
from planner.latency import Latencies
from planner.simulator import Cluster, simulate

KV_BLOCK = 128
"""Tokens of a block of vLLM's prefix cache on a CPU."""

OUTSIDE_S = 0.012
"""Real work of a step outside of its layers (scheduling, sampling, messages), about."""

PREPARE_S, PAUSE_S = 2.0, 0.05
"""How long a change takes with warm workers, about, and how long its commit holds up steps."""


def latencies(spec: ClusterSpec, checkpoint: Checkpoint) -> Latencies:
    """Stage times per step, of the devices that a spec emulates and the work around them.

    Raises:
        ValueError: the spec emulates nothing.
    """
    prior = prior_of(spec, checkpoint)
    if prior is None or not prior.emulated:
        raise ValueError("the spec emulates no devices, so its stage times are not known")
    return replace(prior.latencies, outside=Linear(0.0, OUTSIDE_S))


def uneven(spec: ClusterSpec, checkpoint: Checkpoint, ffn: int) -> float:
    """Load of the busiest FFN actor over the mean, were all experts asked for equally often."""
    rules = Rules(spec.ffn.min_replicas, spec.ffn.redundant_experts)
    names = [f"ffn-{index}" for index in range(ffn)]
    table = initial_table(checkpoint.moe_layers, checkpoint.num_experts, names, rules)
    return imbalance(table)


def rehearse(
    scenario: Scenario, spec: ClusterSpec, targets: Targets, run: Run, checkpoint: Checkpoint
) -> Run:
    """A run as the simulator sees it: the policy decides there too, by the same core."""
    policy = None
    if run.policy:
        core = make_core(spec, run.name, run.parameters, "on")
        core.system = system_of(spec, checkpoint.top_k, checkpoint.num_experts)
        layers = len(checkpoint.moe_layers)
        known = Model(latencies(spec, checkpoint), lanes=core.system.lanes, layers=layers)
        policy = Simulated(core, known)
    found = replace(run, began=0.0)
    found.outcomes, found.changes = _simulated(scenario, spec, targets, run, checkpoint, policy)
    if policy is not None:
        found.decisions = [
            {"at": d.at, "target": str(d.target), "reasons": list(d.reasons), "detail": d.detail}
            for d in policy.decisions
            if d.target is not None
        ]
    return found


def repeat(
    scenario: Scenario, spec: ClusterSpec, targets: Targets, run: Run, checkpoint: Checkpoint
) -> list[Outcome]:
    """What the simulator makes of every request when the changes are those that a run has made.

    By the latencies that the run's own controller had fitted at its end, as they were measured,
    else by those emulated.
    """
    events = [
        Scale(max(0.0, change.at - PREPARE_S), change.attention, change.ffn)
        for change in run.changes
    ]
    known = None
    if run.model is not None:
        known = measured(run.model)
    return _simulated(scenario, spec, targets, run, checkpoint, None, events, known)[0]


def measured(model: Mapping[str, Any]) -> Latencies:
    """Stage times of a model (plain data) without its level.

    The level corrects the closed form that predicts, at the load of the run's end; a simulator
    plays everything out itself, at every load.
    """
    back = 1.0 / model.get("level", 1.0)
    known = Latencies.from_json(json.dumps(model["latencies"]))
    return known.scaled(attention=back, ffn=back, transfer=back, prefill=back)


def _simulated(
    scenario: Scenario,
    spec: ClusterSpec,
    targets: Targets,
    run: Run,
    checkpoint: Checkpoint,
    policy: Simulated | None,
    events: Sequence[Scale] = (),
    known: Latencies | None = None,
) -> tuple[list[Outcome], list[Change]]:
    lanes = spec.lanes if isinstance(spec.lanes, int) else 1
    slots = system_of(spec).slots
    settings = spec.autoscaler
    # One figure for a whole run: the mean over the numbers of FFN actors where they may move
    counts = [run.begin[1]] if not events and policy is None else range(2, spec.ffn.max)
    spread = [uneven(spec, checkpoint, count) for count in counts]
    cluster = Cluster(
        known or latencies(spec, checkpoint),
        attention=run.begin[0],
        ffn=run.begin[1],
        batch=max(1, slots // lanes),
        lanes=lanes,
        boarding="asynchronous",
        steps="joint",
        layers=len(checkpoint.moe_layers),
        imbalance=sum(spread) / len(spread),
        prefill="colocated",
        prefill_chunk=2048 // lanes,
        changes=ChangeTimes(PREPARE_S, PREPARE_S, PAUSE_S, spec.membership.drain_s),
    )
    result = simulate(
        cluster,
        as_arrivals(scenario.asked, KV_BLOCK),
        until=scenario.seconds + run.drain_s,
        events=events,
        policy=policy,
        interval=settings.interval_s if policy else None,
        window=settings.window_s if policy else None,
        keep_requests=True,
    )
    done = {record.number: record for record in result.requests}
    outcomes = []
    for number, request in enumerate(scenario.asked):
        record = done.get(number)
        ttft = tpot = ended = math.nan
        if record is not None:
            ttft, ended = record.first_token - record.arrival, record.finished
            if request.output > 1:
                tpot = (record.finished - record.first_token) / (request.output - 1)
        outcomes.append(
            Outcome(
                at=request.at,
                phase=scenario.phase_at(request.at),
                ttft=ttft,
                tpot=tpot,
                ended=ended,
                complete=record is not None,
                lost=False,
                met=targets.met(ttft, tpot, request.output),
            )
        )
    made = [
        Change(entry.at, entry.attention, entry.ffn)
        for before, entry in zip(result.staff, result.staff[1:], strict=False)
        if (before.attention, before.ffn) != (entry.attention, entry.ffn)
    ]
    # Both legs of a shift become ready one after the other there; together they are one change.
    budget = sum(run.begin)
    return outcomes, [change for change in made if change.attention + change.ffn == budget]
