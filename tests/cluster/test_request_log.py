"""Single requests, as the controller hears of them."""

from __future__ import annotations

import gc
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from cluster.request_log import LIVE, Done, First, RequestLog, gap_of
from cluster.request_metrics import InFlight, Journey, RequestMetrics
from cluster.spec import SLOSpec


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
    return RequestMetrics("m", "frontend-0", SLOSpec(ttft_s=1.0, tpot_s=0.1), clock=clock)


def test_a_request_and_its_end(metrics: RequestMetrics, clock: Clock) -> None:
    journey = metrics.arrived(7)
    journey.cached, journey.replays = 4, 1
    clock.now = 100.5
    metrics.tokens(journey, 1, clock.now)
    clock.now = 101.0
    metrics.tokens(journey, 2, clock.now)
    metrics.finished(journey, "stop")
    metrics.follow(lambda: InFlight(running=3, waiting=2))
    batch = metrics.batch()
    assert batch["events"] == [
        First(1, 100.5, 0.5, 7, 4),
        Done(2, 101.0, 100.0, 0.5, 0.25, 1.0, 7, 3, 4, "stop", 1),
    ]
    assert batch["number"] == 2 and batch["missed"] == 0
    assert (batch["running"], batch["waiting"]) == (3, 2)
    assert (batch["arrived"], batch["tokens"], batch["replays"]) == (1, 3, 1)
    (gap,) = batch["gaps"]
    assert gap_of(gap) == pytest.approx(0.5, rel=0.021)
    assert metrics.batch(2)["events"] == []
    assert metrics.batch(1)["events"] == batch["events"][1:]


def test_one_that_failed_has_no_times(metrics: RequestMetrics, clock: Clock) -> None:
    metrics.finished(metrics.arrived(7), "error")
    (done,) = metrics.batch()["events"]
    assert done.outcome == "error" and done.ttft is done.tpot is done.e2e is None


def test_rejections_count_as_arrivals_once(metrics: RequestMetrics) -> None:
    metrics.rejected("queue_full")  # never got as far as to the pool
    journey = metrics.arrived(7)
    metrics.rejected("no_actor")
    metrics.finished(journey, "error")
    batch = metrics.batch()
    assert (batch["arrived"], batch["rejected"]) == (2, 2)


def test_what_is_in_flight_is_told_while_it_is(metrics: RequestMetrics, clock: Clock) -> None:
    waits, slow, young = (metrics.arrived(7) for _ in range(3))
    metrics.tokens(slow, 8, 101.0)
    metrics.tokens(young, 7, 101.0)
    clock.now = 103.0
    batch = metrics.batch()
    assert batch["waits"] == [3.0]
    assert batch["paces"] == [pytest.approx(2.0 / 8)], "the token that is due counts too"
    for journey in (waits, slow, young):
        metrics.finished(journey, "abort")
    assert metrics.batch()["waits"] == metrics.batch()["paces"] == []


def test_a_request_that_nobody_knows_any_more_is_not_in_flight(metrics: RequestMetrics) -> None:
    metrics.arrived(7)
    gc.collect()
    assert metrics.batch()["waits"] == []


def test_memory_is_bounded(clock: Clock) -> None:
    log = RequestLog(clock, kept=10)
    journeys = [Journey(float(number), 1) for number in range(LIVE + 100)]
    for journey in journeys:
        log.arrived(journey)
    clock.now = 2000.0
    batch = log.since(0)
    assert len(batch["waits"]) == LIVE and batch["waits"][0] == 2000.0, "the longest ones"
    for journey in journeys:
        log.done(journey, "stop")
    batch = log.since(0)
    assert len(batch["events"]) == 10 and batch["missed"] == LIVE + 90
    assert batch["number"] == batch["events"][-1].number == LIVE + 100


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=30))
def test_readers_see_every_record_once(rounds: list[tuple[int, int]]) -> None:
    log, cursor, seen, written = RequestLog(kept=1000), 0, [], 0
    for count, limit in [*rounds, (0, 1000)]:
        for _ in range(count):
            journey = Journey(0.0, 1)
            log.arrived(journey)
            log.done(journey, "stop")
            written += 1
        batch = log.since(cursor, limit)
        cursor = batch["number"]
        seen += [record.number for record in batch["events"]]
        assert len(batch["events"]) <= limit
    assert seen == list(range(1, written + 1))


@given(st.lists(st.floats(1e-5, 100.0), max_size=50))
def test_gaps(gaps: list[float]) -> None:
    log = RequestLog()
    for gap in gaps:
        log.gap(gap)
    told = log.since(0)["gaps"]
    assert sum(told.values()) == len(gaps)
    total = sum(gap_of(number) * count for number, count in told.items())
    assert math.isclose(total, sum(gaps), rel_tol=0.021)
