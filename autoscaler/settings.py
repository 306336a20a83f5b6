"""From a deployment's spec to what the controller decides with: core, limits, targets, timing.

Pure, and the place where a spec's autoscaler section is refused: ``check`` before anything starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoscaler import registry
from autoscaler.core import Core, Mode, Timing
from autoscaler.limits import BadLimits, Limits
from autoscaler.policy import SLO, System
from cluster.spec import ClusterSpec, SpecError

SLOTS = 256
"""vLLM's usual max_num_seqs, until an attention actor says its own."""


def check(spec: ClusterSpec) -> None:
    """Refuse an autoscaler section that can't work.

    Raises:
        SpecError: limits that contradict the pools, a start outside of them, or no metrics.
        BadPolicy: no such policy, or bad parameters.
    """
    settings = spec.autoscaler
    if settings.mode == "off":
        return
    if not spec.metrics.enabled:
        raise SpecError(
            f"autoscaler.mode is {settings.mode} and metrics.enabled is false: the controller "
            "decides by what is measured; enable metrics, or turn the autoscaler off"
        )
    limits = limits_of(spec)
    registry.make(settings.policy, settings.parameters)
    total = spec.attention.count + spec.ffn.count
    low, high = limits.total
    if not low <= total <= high:
        raise SpecError(
            f"attention.count and ffn.count are {spec.attention.count} and {spec.ffn.count}, "
            f"{total} together; autoscaler.min_total..max_total allows {low}..{high}"
        )


def limits_of(spec: ClusterSpec) -> Limits:
    """The limits of a spec: bounds from the pools, budget from the autoscaler section."""
    settings = spec.autoscaler
    try:
        return Limits(
            attention=(spec.attention.min, spec.attention.max),
            ffn=(spec.ffn.min, spec.ffn.max),
            min_total=settings.min_total,
            max_total=settings.max_total,
            max_step=settings.max_step,
            weight_attention=settings.weight_attention,
            weight_ffn=settings.weight_ffn,
        )
    except BadLimits as error:
        raise SpecError(f"the autoscaler section cannot be used: {error}") from error


def slo_of(spec: ClusterSpec) -> SLO:
    """The targets of a spec, in seconds."""
    return SLO(ttft=spec.slo.ttft_s, tpot=spec.slo.tpot_s, percentile=spec.slo.percentile)


def timing_of(spec: ClusterSpec) -> Timing:
    """When the controller of a spec acts."""
    settings = spec.autoscaler
    return make_timing(
        settings.interval_s, settings.window_s, settings.cooldown_s, settings.shrink_cooldown_s
    )


def make_timing(interval: float, window: float, cooldown: float, shrink_cooldown: float) -> Timing:
    """Timing whose ideas of old and of too little data follow from interval and window."""
    return Timing(
        interval=interval,
        cooldown=cooldown,
        shrink_cooldown=shrink_cooldown,
        stale=max(5 * interval, window / 2),
        least_window=min(window / 4, 4 * interval),
    )


def system_of(spec: ClusterSpec, top_k: int | None = None, experts: int | None = None) -> System:
    """What a spec says of the system; the actors' own word replaces slots and room later."""
    engine = spec.attention.engine
    slots = engine.get("max_num_seqs")
    return System(
        slots=slots if isinstance(slots, int) else SLOTS,
        lanes=spec.lanes if isinstance(spec.lanes, int) else 4,
        top_k=top_k,
        experts=experts,
    )


def make_core(
    spec: ClusterSpec,
    policy: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
) -> Core:
    """A core as a spec describes it, with another policy where one is named.

    Raises:
        BadPolicy, SpecError: as ``check``.
    """
    settings = spec.autoscaler
    named = settings.policy if policy is None else policy
    if parameters is None:
        parameters = settings.parameters if named == settings.policy else {}
    if mode is None:
        mode = "advise" if settings.mode == "advise" else "on"
    return Core(
        registry.make(named, parameters),
        limits_of(spec),
        slo_of(spec),
        system_of(spec),
        timing_of(spec),
        mode,
        rebalance_over=0.05 if settings.rebalance else None,
    )
