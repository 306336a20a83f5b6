"""What ``afflux policy replay`` and ``tune`` are given: options to a scenario.

An option wins over a spec, a spec over what a recording says of itself. Says nothing of results.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from afflux.planning import read_latencies
from afflux.replay_options import Given

if TYPE_CHECKING:
    from autoscaler.core import Timing
    from autoscaler.limits import Limits
    from autoscaler.policy import SLO
    from autoscaler.recording import Header
    from autoscaler.replay import Scenario
    from cluster.spec import ClusterSpec
    from planner.latency import Latencies
    from planner.simulator import Cluster
    from planner.traces import Trace

PREPARE_S = 10.0
SLOTS = 64
MAX_QUEUE = 1024


@dataclass(frozen=True)
class Prepared:
    """A scenario, and what is said of it.

    Attributes:
        spec: the one that was given.
        notes: for people, a line each.
    """

    scenario: "Scenario"
    spec: "ClusterSpec | None"
    notes: Sequence[str]


def prepare(given: Given) -> Prepared:
    """The scenario that the options describe.

    Raises:
        typer.BadParameter: options that contradict each other, or one that is missing.
        AffluxError, PlannerError: a file that can't be used, or numbers that don't fit.
    """
    from autoscaler.limits import Counts, nearest
    from autoscaler.recording import read_header
    from autoscaler.replay import Scenario

    if (given.trace is None) == (given.telemetry is None):
        raise typer.BadParameter("expected either --trace FILE or --telemetry FILE")
    header = None if given.telemetry is None else read_header(given.telemetry)
    spec = _read_spec(given.spec)
    trace, cached = _requests(given)
    latencies, lanes, layers, notes = _stage_times(given)
    limits = _limits(given, spec, header)
    start = Counts(
        _first(given.attention, spec and spec.attention.count, header and header.attention, 1),
        _first(given.ffn, spec and spec.ffn.count, header and header.ffn, 1),
    )
    timing, window = _timing(given, spec)
    cluster = _cluster(given, spec, header, latencies, lanes, layers, nearest(start, limits))
    if cluster.prefill == "none":
        notes = [*notes, "these latencies have no prefill time: prompts are taken to be there"]
    scenario = Scenario(cluster, trace, _slo(given, spec, header), limits, timing, window, cached)
    return Prepared(scenario, spec, notes)


def _read_spec(path: Path | None) -> "ClusterSpec | None":
    if path is None:
        return None
    from cluster.spec import load_spec

    return load_spec(path)


def _requests(given: Given) -> "tuple[Trace, Any]":
    from autoscaler.recording import read_requests
    from planner.traces import prefix_reuse, read_trace

    if given.telemetry is not None:
        trace, cached = read_requests(given.telemetry), None
    else:
        assert given.trace is not None
        trace = read_trace(given.trace, given.requests)
        cached = None if trace.blocks is None else prefix_reuse(trace)
    return (trace if given.rate is None else trace.scaled(given.rate)), cached


def _stage_times(given: Given) -> "tuple[Latencies, int, int, list[str]]":
    """Latencies in seconds, lanes and layers that they are about, and notes."""
    if given.latency is not None:
        latencies = read_latencies(given.latency, given.model, None)
        if latencies.unit != "s":
            raise typer.BadParameter(
                f"{given.latency} is in {latencies.unit}, the trace in seconds; write the "
                "latencies in seconds",
                param_hint="'--latency'",
            )
        return latencies, 1, 1, [f"stage times: {latencies.source or given.latency}"]
    if given.telemetry is None:
        raise typer.BadParameter(
            "missing; a trace does not say how long stages take", param_hint="'--latency'"
        )
    from autoscaler.recorded import model_of

    model = model_of(given.telemetry)
    error = "" if math.isnan(model.error) else f", TPOT predicted within {model.error:.1%}"
    notes = [f"stage times: calibrated from {given.telemetry.name}{error}"]
    if not model.reliable:
        notes.append(f"note: the model calls itself unreliable: {model.why}")
    return model.latencies, model.lanes, model.layers, notes


def _limits(given: Given, spec: "ClusterSpec | None", header: "Header | None") -> "Limits":
    from autoscaler.limits import Limits
    from autoscaler.settings import limits_of

    base = Limits() if spec is None else limits_of(spec)
    return Limits(
        attention=(
            _first(given.attention_min, base.attention[0]),
            _first(given.attention_max, base.attention[1]),
        ),
        ffn=(_first(given.ffn_min, base.ffn[0]), _first(given.ffn_max, base.ffn[1])),
        min_total=_first(given.min_total, base.min_total),
        max_total=_first(given.max_total, base.max_total),
        max_step=_first(given.max_step, base.max_step),
        weight_attention=base.weight_attention,
        weight_ffn=base.weight_ffn,
    )


def _slo(given: Given, spec: "ClusterSpec | None", header: "Header | None") -> "SLO":
    from autoscaler.policy import SLO
    from autoscaler.recorded import slo_of as recorded
    from autoscaler.settings import slo_of

    base = SLO(2.0, 0.2) if header is None else recorded(header)
    base = base if spec is None else slo_of(spec)
    return SLO(
        _first(given.slo_ttft, base.ttft),
        _first(given.slo_tpot, base.tpot),
        _first(given.percentile, base.percentile),
    )


def _timing(given: Given, spec: "ClusterSpec | None") -> "tuple[Timing, float]":
    from autoscaler.settings import make_timing
    from cluster.spec import AutoscalerSpec

    base = AutoscalerSpec() if spec is None else spec.autoscaler
    window = _first(given.window, base.window_s)
    timing = make_timing(
        _first(given.interval, base.interval_s),
        window,
        _first(given.cooldown, base.cooldown_s),
        _first(given.shrink_cooldown, base.shrink_cooldown_s),
    )
    return timing, window


def _cluster(
    given: Given,
    spec: "ClusterSpec | None",
    header: "Header | None",
    latencies: "Latencies",
    lanes: int,
    layers: int,
    start: Any,
) -> "Cluster":
    """As afflux serves: lanes of a worker are one step, FFN workers take what has come."""
    from autoscaler.recorded import prepare_seconds
    from planner.events import ChangeTimes
    from planner.simulator import Cluster

    lanes = _first(given.lanes, lanes)
    own = spec and spec.attention.engine.get("max_num_seqs")
    slots = _first(given.slots, own, header and header.slots, SLOTS)
    found = None if given.telemetry is None else prepare_seconds(given.telemetry)
    ready = _first(given.prepare, found, PREPARE_S)
    drain = _first(given.drain, spec and spec.membership.drain_s, 10.0)
    return Cluster(
        latencies,
        start.attention,
        start.ffn,
        batch=max(1, math.ceil(slots / lanes)),
        lanes=lanes,
        boarding="asynchronous",
        steps="joint",
        layers=_first(given.layers, layers),
        kv_tokens=_first(given.kv_tokens, header and header.kv_tokens),
        max_queue=MAX_QUEUE,
        prefill="colocated" if latencies.t_prefill(1000.0) > 0 else "none",
        prefill_chunk=_first(given.prefill_chunk, 512),
        changes=ChangeTimes(ready, ready, 0.02, drain),
    )


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)
