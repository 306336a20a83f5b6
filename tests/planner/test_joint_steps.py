"""Joint steps: the lanes of a worker are parts of one step, as in vLLM's scheduler."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.latency import Latencies, Linear
from planner.loads import Arrival, Arrivals, Closed
from planner.simulator import Cluster, simulate
from planner.workload import Fixed, Independent

LATENCIES = Latencies(
    attention=Linear(0.0, 3.0),
    ffn=Linear(0.0, 5.0),
    transfer=Linear(0.0, 2.0),
    outside=Linear(0.5, 1.0),
)


def cluster(lanes: int, layers: int = 1, latencies: Latencies = LATENCIES, **more: int) -> Cluster:
    return Cluster(
        latencies,
        attention=more.pop("attention", 1),
        batch=2,
        lanes=lanes,
        layers=layers,
        boarding="asynchronous",
        steps="joint",
        **more,
    )


def at_once(requests: int, output: int) -> Arrivals:
    return Arrivals([Arrival(0.0, 7, output)] * requests)


def test_one_lane_is_the_sum_of_its_stages():
    result = simulate(cluster(1), at_once(2, 10))
    assert result.makespan == pytest.approx(10 * (3 + 2 + 5 + (1 + 0.5 * 2)))
    assert result.tpot.p50 == pytest.approx(12, rel=0.02)


def test_time_outside_overlaps_with_nothing_of_the_same_worker():
    """Two lanes: the longest stage twice and the others of one layer once, then the outside."""
    result = simulate(cluster(2, layers=10), at_once(4, 1))
    stages = 2 * 5 + (3 + 2) / 10
    assert result.makespan == pytest.approx(stages + 1 + 0.5 * 4)


def test_lanes_that_get_work_meanwhile_join_at_the_end_of_the_step():
    arrivals = Arrivals([Arrival(0.0, 7, 2), Arrival(1.0, 7, 1)])
    result = simulate(cluster(2), arrivals, keep_requests=True)
    first, second = sorted(result.requests, key=lambda record: record.number)
    assert first.first_token == pytest.approx(3 + 2 + 5 + 1.5)
    assert second.finished == first.finished > first.first_token


@given(
    lanes=st.integers(1, 3),
    layers=st.integers(1, 4),
    attention=st.integers(1, 3),
    lengths=st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(1, 12)), min_size=1
    ),
)
def test_every_token_comes_once(
    lanes: int, layers: int, attention: int, lengths: list[tuple[int, int, int]]
):
    times = sorted(time for time, _, _ in lengths)
    arrivals = [
        Arrival(t, prompt, output) for t, (_, prompt, output) in zip(times, lengths, strict=True)
    ]
    result = simulate(cluster(lanes, layers, attention=attention), Arrivals(arrivals))
    assert result.completed == result.arrived == len(lengths) and result.in_flight == 0
    assert result.tokens == sum(output for _, _, output in lengths)


def test_a_closed_loop_keeps_its_slots_full():
    load = Closed(Independent(Fixed(5), Fixed(8)), requests=40)
    result = simulate(cluster(2), load)
    assert result.completed == 40 and result.tokens == 320


def test_what_makes_no_sense_is_refused():
    with pytest.raises(PlannerError, match="asynchronous"):
        Cluster(LATENCIES, attention=1, steps="joint")
    with pytest.raises(PlannerError, match="folded"):
        Cluster(LATENCIES, attention=1)
    folded = LATENCIES.folded(2)
    assert folded.t_attention(0.0, 2.0) == pytest.approx(3 + 1 / 2 + 0.5 * 2)
    assert folded.outside == Linear(0.0, 0.0)


def test_the_time_outside_survives_json():
    assert Latencies.from_json(LATENCIES.to_json()) == LATENCIES
