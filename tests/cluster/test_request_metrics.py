"""What a frontend measures of requests: by example on a clock of our own, and by property."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from actors.metrics.catalogue import of
from cluster import arrivals
from cluster.arrivals import Arrival, StampArrivals
from cluster.request_metrics import InFlight, Journey, Outcome, RequestMetrics, verdicts
from cluster.spec import SLOSpec

SLO = SLOSpec(ttft_s=1.0, tpot_s=0.1, percentile=0.9)
BASE = {"model_name": "m", "role": "frontend", "actor_id": "frontend-0"}


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> RequestMetrics:
    return RequestMetrics("m", "frontend-0", SLO, clock=clock)


def value(metrics: RequestMetrics, name: str, **labels: str) -> float:
    """One sample, as a scrape would find it."""
    found = metrics.families.registry.get_sample_value(name, {**BASE, **labels})
    assert found is not None, (name, labels)
    return found


def test_every_metric_of_the_catalogue_is_filled(metrics: RequestMetrics) -> None:
    assert not metrics.families.missing
    text = generate_latest(metrics.families.registry).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    for name, metric in of("frontend").items():
        family = found[name.removesuffix("_total")]
        assert family.type == metric.kind and family.samples, f"{name} has no series"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.label_names)
            assert {key: sample.labels[key] for key in BASE} == BASE


def test_a_request_from_arrival_to_its_last_token(metrics: RequestMetrics, clock: Clock) -> None:
    journey = metrics.arrived(7)
    metrics.scheduled(journey, 100.0)
    clock.now = 100.2
    metrics.scheduled(journey, 100.2)  # started again elsewhere: the first time counts
    metrics.tokens(journey, 1, 100.5)
    assert value(metrics, "afd_time_to_first_token_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "afd_prompt_tokens_total") == 7
    metrics.tokens(journey, 3, 100.7)  # several tokens in a message are one gap
    metrics.tokens(journey, 1, 101.3)
    assert value(metrics, "afd_generation_tokens_total") == 5, "while it streams"
    assert value(metrics, "afd_inter_token_latency_seconds_count") == 2
    assert value(metrics, "afd_inter_token_latency_seconds_sum") == pytest.approx(0.8)
    assert value(metrics, "afd_e2e_request_latency_seconds_count") == 0
    metrics.finished(journey, "stop")
    assert value(metrics, "afd_e2e_request_latency_seconds_sum") == pytest.approx(1.3)
    assert value(metrics, "afd_request_queue_time_seconds_sum") == pytest.approx(0.0)
    assert value(metrics, "afd_request_prefill_time_seconds_sum") == pytest.approx(0.5)
    assert value(metrics, "afd_request_decode_time_seconds_sum") == pytest.approx(0.8)
    assert value(metrics, "afd_time_per_output_token_seconds_sum") == pytest.approx(0.2)
    assert value(metrics, "afd_request_prompt_tokens_sum") == 7
    assert value(metrics, "afd_request_generation_tokens_sum") == 5
    assert value(metrics, "afd_requests_total", outcome="stop") == 1
    assert value(metrics, "afd_slo_good_requests_total", slo="ttft") == 1
    assert value(metrics, "afd_slo_good_requests_total", slo="tpot") == 0
    assert value(metrics, "afd_slo_good_requests_total", slo="both") == 0
    assert value(metrics, "afd_slo_requests_total", slo="both") == 1


@pytest.mark.parametrize("outcome", ["abort", "error"])
def test_what_did_not_end_well_has_no_length(metrics: RequestMetrics, outcome: Outcome) -> None:
    journey = metrics.arrived(7)
    metrics.tokens(journey, 2, 100.5)
    metrics.finished(journey, outcome)
    assert value(metrics, "afd_requests_total", outcome=outcome) == 1
    assert value(metrics, "afd_request_generation_tokens_count") == 0
    assert value(metrics, "afd_e2e_request_latency_seconds_count") == 0
    counted = 0 if outcome == "abort" else 1
    assert value(metrics, "afd_slo_requests_total", slo="both") == counted
    assert value(metrics, "afd_slo_good_requests_total", slo="both") == 0


def test_time_counts_from_the_front_door(metrics: RequestMetrics, clock: Clock) -> None:
    arrival = Arrival(99.0)
    first, second = metrics.arrived(1, arrival), metrics.arrived(1, arrival)  # n=2
    metrics.tokens(first, 1, 101.0)
    metrics.tokens(second, 1, 101.0)
    assert value(metrics, "afd_time_to_first_token_seconds_sum") == pytest.approx(4.0)
    clock.now = 105.0
    later = metrics.arrived(1, arrival)  # the same HTTP request's next question to the engine
    assert later.arrived == 105.0


def test_what_is_in_flight_is_read_when_asked(metrics: RequestMetrics) -> None:
    assert value(metrics, "afd_requests_running") == 0
    metrics.follow(lambda: InFlight(running=3, waiting=2, replays=5))
    assert value(metrics, "afd_requests_running") == 3
    assert value(metrics, "afd_requests_waiting") == 2
    assert value(metrics, "afd_requests_replayed_total") == 5
    assert value(metrics, "afd_slo_target_seconds", slo="tpot") == 0.1
    assert value(metrics, "afd_slo_objective_ratio") == 0.9
    metrics.rejected("queue_full")
    assert value(metrics, "afd_requests_rejected_total", reason="queue_full") == 1
    assert value(metrics, "afd_requests_rejected_total", reason="no_actor") == 0


@pytest.mark.parametrize(
    ("journey", "outcome", "expected"),
    [
        (Journey(0, 1, first=1.0, last=1.2, tokens=3), "stop", {"ttft": 1, "tpot": 1, "both": 1}),
        (Journey(0, 1, first=1.1, last=1.2, tokens=3), "stop", {"ttft": 0, "tpot": 1, "both": 0}),
        (Journey(0, 1, first=1.0, last=1.3, tokens=3), "length", {"ttft": 1, "tpot": 0, "both": 0}),
        (Journey(0, 1, first=0.5, last=0.5, tokens=1), "length", {"ttft": 1, "both": 1}),
        (Journey(0, 1, first=0.5, last=0.5, tokens=1), "error", {"ttft": 0, "tpot": 0, "both": 0}),
        (Journey(0, 1, first=0.5, last=0.5, tokens=1), "abort", {}),
        (Journey(0, 1), "stop", {}),
    ],
)
def test_verdicts(journey: Journey, outcome: Outcome, expected: dict[str, int]) -> None:
    assert verdicts(journey, outcome, SLO) == expected


@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0, 5)), max_size=8),
    st.floats(-5, 5),
    st.sampled_from(["stop", "length", "abort", "error"]),
)
def test_any_journey_adds_up(
    messages: list[tuple[int, float]], scheduled: float, outcome: Any
) -> None:
    clock = Clock()
    metrics = RequestMetrics("m", "frontend-0", SLO, clock=clock)
    journey = metrics.arrived(4)
    clock.now += 5
    metrics.scheduled(journey, 100 + scheduled)
    assert journey.scheduled is not None and 100 <= journey.scheduled <= clock.now
    for count, gap in messages:
        clock.now += gap
        metrics.tokens(journey, count, clock.now)
    metrics.finished(journey, outcome)
    complete = outcome in ("stop", "length") and bool(messages)
    assert value(metrics, "afd_generation_tokens_total") == sum(n for n, _ in messages)
    assert value(metrics, "afd_time_to_first_token_seconds_count") == bool(messages)
    assert value(metrics, "afd_inter_token_latency_seconds_count") == max(0, len(messages) - 1)
    parts = [
        value(metrics, f"afd_request_{part}_time_seconds_sum")
        for part in ("queue", "prefill", "decode")
    ]
    assert min(parts) >= 0
    if complete:
        assert sum(parts) == pytest.approx(value(metrics, "afd_e2e_request_latency_seconds_sum"))
    for slo in ("ttft", "tpot", "both"):
        good = value(metrics, "afd_slo_good_requests_total", slo=slo)
        assert good <= value(metrics, "afd_slo_requests_total", slo=slo) <= 1


async def test_arrivals_are_noted_and_do_not_leak() -> None:
    seen: list[Arrival | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        inner = asyncio.create_task(look())
        await inner
        if scope.get("path") == "/broken":
            raise KeyError("from the app")

    async def look() -> None:
        seen.append(arrivals.current())

    stamped: Any = StampArrivals(app, clock=lambda: 42.0)
    await stamped({"type": "http"}, None, None)
    with pytest.raises(KeyError):
        await stamped({"type": "http", "path": "/broken"}, None, None)
    await stamped({"type": "websocket"}, None, None)
    assert [arrival.at if arrival else None for arrival in seen] == [42.0, 42.0, None]
    assert arrivals.current() is None
