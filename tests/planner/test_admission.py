"""Open loops: queues, KV room, placement, prefill, and the times that users see."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.latency import Latencies, Linear
from planner.loads import Arrival, Arrivals, Closed, Poisson, replay
from planner.simulator import Cluster, simulate
from planner.workload import Fixed, Geometric, Independent

STEP = 10.0
LAT = Latencies(Linear(0, 5.0), Linear(0, 3.0), Linear(0, 2.0), prefill=Linear(0.1, 1.0), unit="ms")
"""A step of one lane that meets no other takes 10 ms."""

LOAD = Independent(Fixed(50), Geometric(20))


def one(cluster: Cluster, *arrivals: Arrival):
    result = simulate(cluster, Arrivals(arrivals), keep_requests=True)
    assert result.in_flight == 0
    return result


def test_a_lone_request_takes_one_step_per_token():
    result = one(Cluster(LAT, attention=2, batch=4), Arrival(7.0, 50, 4))

    (record,) = result.requests
    assert record.arrival == 7.0
    assert record.first_token == pytest.approx(17.0)
    assert record.finished == pytest.approx(47.0)
    assert result.ttft.mean == pytest.approx(STEP)
    assert result.tpot.mean == result.itl.mean == pytest.approx(STEP)
    assert result.e2e.mean == pytest.approx(4 * STEP)


def test_colocated_prefill_rides_in_chunks_and_its_last_one_emits_the_first_token():
    cluster = Cluster(LAT, attention=1, batch=4, lanes=1, prefill="colocated", prefill_chunk=40)

    result = one(cluster, Arrival(0.0, 100, 3))

    # Two chunks of 40 and one of 20 with no attention of their own, then two decode steps.
    chunks = [1 + 4.0 + 5.0, 1 + 4.0 + 5.0, 1 + 2.0 + 5.0]
    (record,) = result.requests
    assert record.first_token == pytest.approx(sum(chunks))
    assert record.finished == pytest.approx(sum(chunks) + 2 * STEP)
    assert result.tokens == 3


def test_colocated_chunks_load_the_experts_and_slow_those_who_decode():
    lat = replace(LAT, ffn=Linear(0.5, 3.0))
    cluster = Cluster(lat, attention=1, batch=4, lanes=1, prefill="colocated", prefill_chunk=64)

    result = one(cluster, Arrival(0.0, 1, 30), Arrival(50.0, 64, 1))

    calm = STEP + 0.5
    assert result.itl.most == pytest.approx(calm + 64 * 0.5 + 1 + 6.4)
    assert result.itl.p50 == pytest.approx(calm, rel=0.011)


def test_cached_tokens_are_not_prefilled_but_one_always_is():
    cluster = Cluster(LAT, attention=1, batch=4, lanes=1, prefill="colocated")

    some = one(cluster, Arrival(0.0, 100, 1, cached=60))
    every = one(cluster, Arrival(0.0, 100, 1, cached=100))

    assert some.ttft.mean == pytest.approx(1 + 4.0 + 5.0)
    assert every.ttft.mean == pytest.approx(1 + 0.1 + 5.0)


def test_disaggregated_prefill_emits_the_first_token_before_the_kv_moves():
    cluster = Cluster(
        LAT,
        attention=1,
        batch=4,
        lanes=1,
        prefill="disaggregated",
        prefill_workers=1,
        kv_transfer=Linear(0.02, 1.0),
    )

    result = one(cluster, Arrival(0.0, 100, 3), Arrival(0.0, 50, 1))

    first, second = sorted(result.requests, key=lambda record: record.number)
    assert first.first_token == pytest.approx(11.0)
    kv = 0.02 * 101 + 1
    assert first.finished == pytest.approx(11.0 + kv + 2 * STEP)
    # It waits for the only prefill worker, and is done when prefill is.
    assert second.first_token == second.finished == pytest.approx(11.0 + 6.0)
    assert second.worker == -1
    assert result.tokens == 4


def test_the_queue_is_bounded_and_first_come_first_served():
    cluster = Cluster(LAT, attention=1, batch=1, lanes=1, max_queue=2)
    arrivals = [Arrival(0.1 * i, 10, 2) for i in range(5)]

    result = one(cluster, *arrivals)

    assert result.rejected == 2
    assert [record.number for record in result.requests] == [0, 1, 2]
    assert result.requests[2].first_token == pytest.approx(5 * STEP)


def test_without_a_queue_a_free_slot_still_takes_a_request():
    cluster = Cluster(LAT, attention=1, batch=1, lanes=1, max_queue=0)

    result = one(cluster, Arrival(0, 10, 2), Arrival(1, 10, 2), Arrival(100, 10, 2))

    assert [record.number for record in result.requests] == [0, 2]


def test_kv_room_is_reserved_for_prompt_and_output():
    cluster = Cluster(LAT, attention=1, batch=8, lanes=1, kv_tokens=100)

    result = one(
        cluster, Arrival(0, 50, 10), Arrival(1, 50, 10), Arrival(2, 10, 2), Arrival(3, 99, 2)
    )

    # The second waits for the first, the third waits its turn, the fourth can never fit.
    assert result.rejected == 1
    by_number = {record.number: record for record in result.requests}
    assert by_number[1].first_token == pytest.approx(by_number[0].finished + STEP)
    assert by_number[2].first_token >= by_number[1].first_token


def test_requests_go_to_the_worker_with_the_fewest():
    cluster = Cluster(LAT, attention=3, batch=4)

    result = one(cluster, *[Arrival(0.01 * i, 10, 5) for i in range(12)])

    assert sorted(record.worker for record in result.requests) == [0] * 4 + [1] * 4 + [2] * 4


def test_ttft_includes_the_queue():
    cluster = Cluster(LAT, attention=1, batch=2, lanes=1)
    light = simulate(cluster, Poisson(LOAD, 0.0001, 50))
    heavy = simulate(cluster, Poisson(LOAD, 0.02, 50))

    assert light.ttft.p50 == pytest.approx(STEP, rel=0.011)
    assert heavy.ttft.p50 > 5 * STEP
    assert heavy.tpot.p50 == pytest.approx(STEP, rel=0.011)


def test_the_rate_that_is_asked_for_arrives():
    cluster = Cluster(LAT, attention=2, batch=64)
    load = Poisson(LOAD, [(0.0, 0.1), (10_000.0, 0.0), (20_000.0, 0.3)], None)

    result = simulate(cluster, load, until=30_000.0, seed=3)

    width = result.series.width
    counts = [0, 0, 0]
    for index, arrived in enumerate(result.series.arrived):
        counts[min(2, int(index * width / 10_000))] += arrived
    assert counts[0] == pytest.approx(1000, rel=0.1)
    assert counts[1] <= 30  # the bins at the borders
    assert counts[2] == pytest.approx(3000, rel=0.1)


def test_little_holds():
    """Requests in flight are the rate times their time (Little's law)."""
    cluster = Cluster(LAT, attention=2, batch=64)

    result = simulate(cluster, Poisson(LOAD, 0.1, 4000), seed=2)

    in_flight = np.mean(result.series.running) + np.mean(result.series.waiting)
    assert in_flight == pytest.approx(0.1 * result.e2e.mean, rel=0.1)


def test_a_trace_is_replayed_in_seconds_without_what_emits_nothing():
    trace = SimpleNamespace(
        arrival=np.array([0.0, 0.5, 1.0]), prompt=np.array([5, 6, 7]), output=np.array([2, 0, 3])
    )
    seconds = LAT.scaled(attention=1e-3, ffn=1e-3, transfer=1e-3, prefill=1e-3, unit="s")

    result = simulate(Cluster(seconds, attention=1), replay(trace), keep_requests=True)

    assert [(r.prompt, r.output) for r in result.requests] == [(5, 2), (7, 3)]
    with pytest.raises(PlannerError, match="'ms'"):
        simulate(Cluster(LAT, attention=1), replay(trace))
    with pytest.raises(PlannerError, match="3 requests"):
        replay(trace, cached=[1])


def test_prefill_elsewhere_keeps_the_slot_of_a_closed_loop():
    cluster = Cluster(
        LAT, attention=1, batch=2, lanes=1, prefill="disaggregated", prefill_workers=4
    )

    result = simulate(cluster, Closed(LOAD, 50))

    assert result.completed == 50
    assert max(result.series.running) == 2


def test_a_request_that_prefill_completes_makes_room_for_the_next():
    cluster = Cluster(LAT, attention=1, batch=4, lanes=1, prefill="colocated", kv_tokens=60)

    result = one(cluster, *[Arrival(0.1 * i, 50, 1) for i in range(5)])

    assert result.completed == 5


@settings(max_examples=30, deadline=None)
@given(
    workers=st.integers(1, 3),
    batch=st.integers(1, 6),
    boarding=st.sampled_from(["barrier", "asynchronous"]),
    prefill=st.sampled_from(["none", "colocated", "disaggregated"]),
    rate=st.floats(0.001, 1.0),
    kv_tokens=st.none() | st.integers(60, 400),
    max_queue=st.none() | st.integers(0, 5),
    until=st.none() | st.floats(1.0, 5000.0),
    seed=st.integers(0, 99),
)
def test_what_arrives_is_completed_refused_or_in_flight(
    workers, batch, boarding, prefill, rate, kv_tokens, max_queue, until, seed
):
    cluster = Cluster(
        LAT,
        attention=workers,
        batch=batch,
        boarding=boarding,
        prefill=prefill,
        prefill_workers=1 if prefill == "disaggregated" else 0,
        prefill_chunk=16,
        kv_tokens=kv_tokens,
        max_queue=max_queue,
    )

    result = simulate(cluster, Poisson(LOAD, rate, 60), seed=seed, until=until, keep_requests=True)

    assert result.arrived == result.completed + result.rejected + result.in_flight
    assert result.completed == len(result.requests)
    if until is None:
        assert (result.arrived, result.in_flight) == (60, 0)
        assert result.tokens == sum(record.output for record in result.requests)
    for record in result.requests:
        assert record.arrival < record.first_token <= record.finished
