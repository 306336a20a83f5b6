"""What ``afflux top`` shows, from scrapes: traffic, latencies, and one row per actor. Pure.

Rates and shares are of the time between the last two scrapes, percentiles of a longer window,
because a second holds few requests. Drawing is ``afflux/top_view.py``'s.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.metrics.catalogue import DIRECTIONS
from dashboards.scrape import Scrape
from dashboards.window import Spread, Window, now, now_by, process

STAGES = ("queue", "wire_out", "boarding", "compute", "reply", "wire_back")
"""Of a frame's round trip, in order; they add up to ``total``."""


@dataclass(frozen=True)
class AttentionRow:
    """One attention actor.

    Attributes:
        compute, wait: shares of time, 0 to 1: computing, and nothing to do until an FFN actor
            answers; the rest is idle.
        steps_per_s, batch_tokens, lanes: engine steps, and means per step.
        step_s, hop_s: mean durations of a step and of a frame's round trip.
        kv_usage: share of the KV cache in use.
    """

    actor: str
    epoch: int | None
    compute: float | None
    wait: float | None
    steps_per_s: float | None
    step_s: float | None
    batch_tokens: float | None
    lanes: float | None
    running: int | None
    waiting: int | None
    kv_usage: float | None
    hop_s: float | None


@dataclass(frozen=True)
class FFNRow:
    """One FFN actor.

    Attributes:
        busy, compute: shares of time, 0 to 1: on rides, and of that in kernels.
        rides_per_s, batch_tokens: rides, and mean tokens of one.
        ride_s, boarding_s: mean durations of a ride, and of a frame's wait for one.
        queue: frames that wait.
        balance: greatest over mean load of its experts; 1 is even.
    """

    actor: str
    epoch: int | None
    busy: float | None
    compute: float | None
    rides_per_s: float | None
    ride_s: float | None
    batch_tokens: float | None
    boarding_s: float | None
    queue: int | None
    experts: int | None
    balance: float | None


@dataclass(frozen=True)
class View:
    """A deployment at one moment.

    Attributes:
        at: Unix time.
        interval_s: what rates and shares are of; None: there was one scrape only.
        window_s: what percentiles, outcomes and faults are of; None: since the processes began.
        states: actors by role and state; ``targets``: wanted ones by role.
        ratio, target_ratio: attention actors per FFN actor.
        change_age_s: of the change under way; 0 without one.
        slo_s: targets by name; ``attained``: shares of requests that met them;
            ``objective``: the share that should.
        hops_s: mean seconds of a frame's round trip by stage, ``total`` included.
        bytes_per_s: payload by direction.
        faults: by kind, with resends and refusals.
        missing: why a page could not be read, by URL.
    """

    at: float
    interval_s: float | None
    window_s: float | None
    model: str | None = None
    deployment: str | None = None
    healthy: bool | None = None
    epoch: int | None = None
    states: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    ratio: float | None = None
    target_ratio: float | None = None
    warm: int | None = None
    warm_target: int | None = None
    change_age_s: float | None = None
    running: int | None = None
    waiting: int | None = None
    generation_tokens_per_s: float | None = None
    prompt_tokens_per_s: float | None = None
    requests_per_s: float | None = None
    outcomes: Mapping[str, int] = field(default_factory=dict)
    rejected: int | None = None
    replayed: int | None = None
    ttft: Spread = field(default_factory=Spread)
    itl: Spread = field(default_factory=Spread)
    tpot: Spread = field(default_factory=Spread)
    e2e: Spread = field(default_factory=Spread)
    slo_s: Mapping[str, float] = field(default_factory=dict)
    attained: Mapping[str, float] = field(default_factory=dict)
    objective: float | None = None
    hops_s: Mapping[str, float] = field(default_factory=dict)
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)
    attention: tuple[AttentionRow, ...] = ()
    ffn: tuple[FFNRow, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def view(new: Scrape, previous: Scrape | None = None, begin: Scrape | None = None) -> View:
    """Everything about a deployment.

    Args:
        new: the newest scrape.
        previous: the one before it, for rates and shares; None: there are none.
        begin: the one at which the window of percentiles begins; None: since the processes began.
    """
    last = Window(previous, new)
    window = Window(begin, new)
    config = _labels_of(new, "afd_config_info")
    return View(
        at=new.at,
        interval_s=last.seconds,
        window_s=window.seconds,
        model=config.get("model_name") or _model(new),
        deployment=config.get("deployment"),
        healthy=_flag(now(new, "afd_healthy")),
        epoch=_whole(now(new, "afd_epoch")),
        states=_states(new),
        targets=_counts(now_by(new, "afd_actors_target", "role")),
        ratio=now(new, "afd_attention_ffn_ratio"),
        target_ratio=now(new, "afd_attention_ffn_target_ratio"),
        warm=_whole(now(new, "afd_warm_workers")),
        warm_target=_whole(now(new, "afd_warm_workers_target")),
        change_age_s=now(new, "afd_change_age_seconds"),
        running=_whole(now(new, "afd_requests_running")),
        waiting=_whole(now(new, "afd_requests_waiting")),
        generation_tokens_per_s=last.rate("afd_generation_tokens_total"),
        prompt_tokens_per_s=last.rate("afd_prompt_tokens_total"),
        requests_per_s=last.rate("afd_requests_total"),
        outcomes=_counts(window.by("afd_requests_total", "outcome")),
        rejected=_whole(window.increase("afd_requests_rejected_total")),
        replayed=_whole(window.increase("afd_requests_replayed_total")),
        ttft=window.spread("afd_time_to_first_token_seconds"),
        itl=window.spread("afd_inter_token_latency_seconds"),
        tpot=window.spread("afd_time_per_output_token_seconds"),
        e2e=window.spread("afd_e2e_request_latency_seconds"),
        slo_s=_least(new, "afd_slo_target_seconds", "slo"),
        attained=_attained(window),
        objective=min(new.series.get("afd_slo_objective_ratio", {}).values(), default=None),
        hops_s=_hops(last),
        bytes_per_s=_bytes(last),
        faults=_faults(window),
        attention=tuple(_attention(new, last, actor) for actor in _actors(new, "attention")),
        ffn=tuple(_ffn(new, last, actor) for actor in _actors(new, "ffn")),
        missing=new.missing,
    )


class History:
    """Turns scrapes into views as they come; keeps as many as the window is long, one at least.

    Args:
        window_s: of percentiles, outcomes and faults.
    """

    def __init__(self, window_s: float):
        self._window_s = window_s
        self._scrapes: deque[Scrape] = deque()

    def add(self, scrape: Scrape) -> View:
        """The view of the newest scrape; the first one has no rates."""
        scrapes = self._scrapes
        while len(scrapes) > 1 and scrape.at - scrapes[0].at > self._window_s:
            scrapes.popleft()
        previous, begin = (scrapes[-1], scrapes[0]) if scrapes else (None, None)
        scrapes.append(scrape)
        return view(scrape, previous, begin)


def _attention(new: Scrape, last: Window, actor: str) -> AttentionRow:
    who = {"role": "attention", "actor_id": actor}
    return AttentionRow(
        actor=actor,
        epoch=_whole(now(new, "afd_table_epoch", **who)),
        compute=_share(last.rate("afd_attention_compute_seconds_sum", **who)),
        wait=_share(last.rate("afd_attention_wait_seconds_sum", **who)),
        steps_per_s=last.rate("afd_attention_step_seconds_count", **who),
        step_s=last.mean("afd_attention_step_seconds", **who),
        batch_tokens=last.mean("afd_attention_batch_tokens", **who),
        lanes=last.mean("afd_attention_lanes", **who),
        running=_whole(now(new, "afd_attention_requests_running", **who)),
        waiting=_whole(now(new, "afd_attention_requests_waiting", **who)),
        kv_usage=now(new, "afd_attention_kv_cache_usage_ratio", **who),
        hop_s=last.mean("afd_transport_hop_seconds", stage="total", **who),
    )


def _ffn(new: Scrape, last: Window, actor: str) -> FFNRow:
    who = {"role": "ffn", "actor_id": actor}
    busy = last.increase("afd_ffn_busy_seconds_total", **who)
    idle = last.increase("afd_ffn_idle_seconds_total", **who)
    both = (busy or 0.0) + (idle or 0.0)
    return FFNRow(
        actor=actor,
        epoch=_whole(now(new, "afd_table_epoch", **who)),
        busy=_share(busy / both) if busy is not None and both > 0 else None,
        compute=_share(last.rate("afd_ffn_compute_seconds_sum", **who)),
        rides_per_s=last.rate("afd_ffn_step_seconds_count", **who),
        ride_s=last.mean("afd_ffn_step_seconds", **who),
        batch_tokens=last.mean("afd_ffn_batch_tokens", **who),
        boarding_s=last.mean("afd_ffn_boarding_wait_seconds", **who),
        queue=_whole(now(new, "afd_ffn_queue_depth", **who)),
        experts=_whole(now(new, "afd_ffn_experts", **who)),
        balance=now(new, "afd_ffn_expert_load_balance_ratio", **who),
    )


def _hops(last: Window) -> dict[str, float]:
    means = {
        stage: last.mean("afd_transport_hop_seconds", stage=stage) for stage in (*STAGES, "total")
    }
    return {stage: mean for stage, mean in means.items() if mean is not None}


def _bytes(last: Window) -> dict[str, float]:
    rates = {way: last.rate("afd_transport_bytes_total", direction=way) for way in DIRECTIONS}
    return {way: rate for way, rate in rates.items() if rate is not None}


def _faults(window: Window) -> dict[str, int]:
    found = _counts(window.by("afd_faults_total", "kind"))
    for name, metric in (
        ("resends", "afd_transport_resends_total"),
        ("refusals", "afd_transport_refusals_total"),
    ):
        count = window.increase(metric)
        if count is not None:
            found[name] = round(count)
    return found


def _attained(window: Window) -> dict[str, float]:
    asked = window.by("afd_slo_requests_total", "slo")
    good = window.by("afd_slo_good_requests_total", "slo")
    return {slo: good.get(slo, 0.0) / count for slo, count in asked.items() if count > 0}


def _states(new: Scrape) -> dict[str, dict[str, int]]:
    roles = sorted({dict(labels).get("role", "") for labels in new.series.get("afd_actors", {})})
    return {
        role: {
            state: count
            for state, count in _counts(now_by(new, "afd_actors", "state", role=role)).items()
            if count
        }
        for role in roles
    }


def _actors(new: Scrape, role: str) -> list[str]:
    """Who has a page, in the order that people count in: ffn-2 before ffn-10."""
    found = {
        who[1]
        for values in new.series.values()
        for labels in values
        if (who := process(labels)) is not None and who[0] == role
    }
    return sorted(found, key=natural)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts names with numbers in them by number."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _labels_of(new: Scrape, name: str) -> dict[str, str]:
    return dict(next(iter(new.series.get(name, {})), ()))


def _model(new: Scrape) -> str | None:
    every = (dict(labels) for values in new.series.values() for labels in values)
    return next((labels["model_name"] for labels in every if "model_name" in labels), None)


def _least(new: Scrape, name: str, label: str) -> dict[str, float]:
    """A gauge that several processes repeat (every frontend its targets): one value per label."""
    found: dict[str, float] = {}
    for labels, value in new.series.get(name, {}).items():
        group = dict(labels).get(label, "")
        found[group] = min(value, found.get(group, value))
    return found


def _counts(values: Mapping[str, float]) -> dict[str, int]:
    return {name: round(value) for name, value in sorted(values.items())}


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _flag(value: float | None) -> bool | None:
    return None if value is None else value >= 1


def _share(value: float | None) -> float | None:
    """A share of time; a long step that ended just now would give more than all of it."""
    return None if value is None else min(1.0, value)
