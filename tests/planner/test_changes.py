"""Scaling, failures and policies in the simulator's loop."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.control import Snapshot, Target
from planner.errors import PlannerError
from planner.events import ChangeTimes, Failure, Scale
from planner.latency import Latencies, Linear
from planner.loads import Arrival, Arrivals, Closed, Poisson
from planner.simulator import Cluster, simulate
from planner.workload import Fixed, Geometric, Independent

STEP = 10.0
LAT = Latencies(Linear(0, 5.0), Linear(0, 3.0), Linear(0, 2.0), prefill=Linear(0.1, 1.0), unit="ms")
LOAD = Independent(Fixed(50), Geometric(20))
BOTH = pytest.mark.parametrize("boarding", ["barrier", "asynchronous"])


def long_requests(count: int, output: int = 50) -> Arrivals:
    return Arrivals([Arrival(0.0, 10, output) for _ in range(count)])


@BOTH
def test_new_attention_workers_take_requests_once_they_are_prepared(boarding):
    cluster = Cluster(
        LAT,
        attention=1,
        batch=2,
        lanes=1,
        boarding=boarding,
        changes=ChangeTimes(prepare_attention=95.0),
    )

    result = simulate(
        cluster, long_requests(4), events=[Scale(100.0, attention=2)], keep_requests=True
    )

    late = [record for record in result.requests if record.worker == 1]
    assert len(late) == 2
    # Ready at 195; a barrier group takes the new member in at its next step.
    begins = {"barrier": 200.0, "asynchronous": 195.0}[boarding]
    assert [record.first_token for record in late] == pytest.approx([begins + STEP] * 2, abs=3.0)
    assert result.attention_left == 2
    assert (195.0, "+1 attention") in result.changes


def test_a_commit_holds_steps_up_for_its_pause():
    cluster = Cluster(LAT, attention=1, batch=4, lanes=1, changes=ChangeTimes(commit_pause=100.0))

    result = simulate(cluster, long_requests(1), events=[Scale(42.0, attention=2)])

    assert result.itl.most == pytest.approx(142.0 - 50.0 + STEP)
    assert result.makespan == pytest.approx(50 * STEP + 92.0)


@BOTH
def test_a_retiring_worker_finishes_what_it_has(boarding):
    cluster = Cluster(LAT, attention=2, batch=4, lanes=1, boarding=boarding)

    result = simulate(
        cluster,
        long_requests(8),
        events=[Scale(105.0, attention=-1, relative=True)],
        keep_requests=True,
    )

    assert (result.completed, result.replayed, result.attention_left) == (8, 0, 1)
    assert sorted(record.worker for record in result.requests) == [0] * 4 + [1] * 4


@BOTH
@pytest.mark.parametrize("prefill", ["none", "colocated", "disaggregated"])
def test_at_the_deadline_the_rest_is_replayed_elsewhere(boarding, prefill):
    cluster = Cluster(
        LAT,
        attention=2,
        batch=8,
        lanes=2,
        boarding=boarding,
        prefill=prefill,
        prefill_workers=1 if prefill == "disaggregated" else 0,
        changes=ChangeTimes(drain_deadline=150.0),
    )

    result = simulate(
        cluster, long_requests(8), events=[Scale(105.0, attention=1)], keep_requests=True
    )

    assert (result.completed, result.replayed, result.attention_left) == (8, 4, 1)
    assert result.tokens == 8 * 50
    assert len({record.worker for record in result.requests}) == 1
    assert sorted(record.replays for record in result.requests) == [0] * 4 + [1] * 4


def test_ffn_workers_change_the_pace():
    lat = Latencies(Linear(0, 1.0), Linear(1.0, 0.0), Linear(0, 0.0), unit="ms")
    cluster = Cluster(
        lat, attention=1, batch=8, lanes=1, changes=ChangeTimes(prepare_ffn=10.0, commit_pause=5.0)
    )

    result = simulate(cluster, long_requests(8, 10), events=[Scale(35.0, ffn=4)])

    # 5 steps of 1 + 8; the change at 45 holds the next call up to 50; then steps of 1 + 2.
    assert result.makespan == pytest.approx(45.0 + 5.0 + 2.0 + 4 * 3.0)
    assert result.ffn_left == 4


@BOTH
@pytest.mark.parametrize("prefill", ["none", "colocated", "disaggregated"])
def test_a_lost_attention_worker_loses_no_request(boarding, prefill):
    cluster = Cluster(
        LAT,
        attention=2,
        batch=8,
        boarding=boarding,
        prefill=prefill,
        prefill_workers=2 if prefill == "disaggregated" else 0,
    )

    result = simulate(
        cluster,
        long_requests(8),
        events=[Failure(123.0, "attention", detect=200.0, worker=0)],
        keep_requests=True,
    )

    assert (result.completed, result.replayed, result.attention_left) == (8, 4, 1)
    assert result.tokens == 8 * 50
    assert all(record.worker == 1 for record in result.requests)
    assert result.itl.most > 200.0


def test_a_barrier_group_waits_for_the_lost_until_it_is_noticed_and_others_do_not():
    def slowest(boarding: str) -> float:
        cluster = Cluster(LAT, attention=2, batch=4, lanes=1, boarding=boarding)
        result = simulate(
            cluster,
            long_requests(8),
            events=[Failure(102.0, "attention", detect=300.0, worker=0)],
            keep_requests=True,
        )
        return min(record.finished for record in result.requests if not record.replays)

    assert slowest("asynchronous") < 50 * STEP + 50
    assert slowest("barrier") > 50 * STEP + 290


def test_a_lost_ffn_worker_stalls_calls_until_the_others_have_its_experts():
    cluster = Cluster(LAT, attention=1, ffn=2, batch=4, lanes=1)

    # At 107 a call is under way (106 to 109); it begins again at 157.
    result = simulate(
        cluster, long_requests(4), events=[Failure(107.0, "ffn", detect=20.0, recover=30.0)]
    )

    assert result.makespan == pytest.approx(50 * STEP + 51.0)
    assert result.ffn_left == 1
    assert result.tokens == 200


def test_without_ffn_workers_nothing_moves_until_new_ones_come():
    cluster = Cluster(LAT, attention=1, batch=4, lanes=1)
    lost = Failure(107.0, "ffn", detect=1.0)

    stalled = simulate(cluster, long_requests(4), events=[lost])
    saved = simulate(cluster, long_requests(4), events=[lost, Scale(1000.0, ffn=1)])

    assert (stalled.completed, stalled.in_flight, stalled.ffn_left) == (0, 4, 0)
    assert (saved.completed, saved.ffn_left) == (4, 1)
    assert saved.makespan == pytest.approx(1000 + 3 + 1 + 39 * STEP)


def test_losing_every_attention_worker_leaves_requests_waiting():
    result = simulate(
        Cluster(LAT, attention=1, batch=2),
        long_requests(2),
        events=[Failure(50.0, "attention"), Failure(60.0, "attention")],
    )

    assert (result.completed, result.in_flight, result.attention_left) == (0, 2, 0)
    assert result.changes[-1] == (60.0, "no attention worker to lose")


class Watcher:
    """Records what it sees, and asks for one thing at one time."""

    def __init__(self, when: float = math.inf, target: Target | None = None):
        self.seen: list[Snapshot] = []
        self.when = when
        self.target = target

    def decide(self, snapshot: Snapshot) -> Target | None:
        self.seen.append(snapshot)
        return self.target if snapshot.now >= self.when else None


def test_a_policy_sees_the_window_and_is_obeyed_once():
    policy = Watcher(1000.0, Target(attention=3, ffn=2))
    cluster = Cluster(
        LAT,
        attention=1,
        batch=8,
        changes=ChangeTimes(prepare_attention=600.0, prepare_ffn=300.0),
    )

    result = simulate(cluster, Poisson(LOAD, 0.05, 400), policy=policy, interval=500.0, seed=4)

    assert [s.now for s in policy.seen[:3]] == [500.0, 1000.0, 1500.0]
    assert [(s.attention, s.attention_preparing) for s in policy.seen[:4]] == [
        (1, 0),
        (1, 0),
        (1, 2),
        (3, 0),
    ]
    assert [(s.ffn, s.ffn_preparing) for s in policy.seen[:3]] == [(1, 0), (1, 0), (2, 0)]
    assert (result.attention_left, result.ffn_left) == (3, 2)
    assert sum(s.completed for s in policy.seen) <= result.completed == 400
    busy = [s for s in policy.seen if s.completed > 20]
    for snapshot in busy:
        assert snapshot.window == 500.0
        assert 0 < snapshot.attention_busy <= 1 and 0 < snapshot.ffn_busy <= 1
        assert 0 < snapshot.batch <= 8
        assert 50 * snapshot.batch < snapshot.kv_tokens
        assert snapshot.theta > 50 and snapshot.nu2 >= 0
        assert snapshot.prompt_mean == 50
        assert snapshot.ttft.count and snapshot.itl.p50 >= 5.0


def test_a_policy_that_never_helps_does_not_run_for_ever():
    policy = Watcher()

    result = simulate(
        Cluster(LAT, attention=1, batch=2),
        long_requests(2),
        events=[Failure(5.0, "ffn")],
        policy=policy,
        interval=1.0,
    )

    assert result.in_flight == 2
    assert len(policy.seen) < 2000


def test_what_is_being_prepared_is_cancelled_first():
    cluster = Cluster(LAT, attention=2, batch=4, changes=ChangeTimes(prepare_attention=100.0))
    events = [Scale(10.0, attention=5), Scale(50.0, attention=1), Scale(60.0, ffn=3, relative=True)]

    result = simulate(cluster, long_requests(8), events=events)

    assert result.attention_left == 1
    assert result.ffn_left == 4
    assert not any(text.startswith("+") for _, text in result.changes)


def test_a_change_after_next_to_no_time_does_not_upset_the_series():
    events = [Scale(5e-324, attention=3)]

    result = simulate(Cluster(LAT, attention=1, batch=2), Closed(LOAD, 5), events=events)

    assert sum(result.series.tokens) == result.tokens


@pytest.mark.parametrize("boarding", ["barrier", "asynchronous"])
def test_spans_survive_the_loss_of_their_worker(boarding):
    result = simulate(
        Cluster(LAT, attention=2, batch=4, boarding=boarding),
        long_requests(4),
        events=[Failure(53.0, "attention", worker=0)],
        spans=1000,
    )

    assert {span.worker for span in result.spans} >= {"A0", "A1", "F"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Scale(-1.0), "time -1"),
        (lambda: Scale(0.0, attention=0), "0 attention"),
        (lambda: Failure(0.0, "router"), "'router'"),
        (lambda: Failure(0.0, "ffn", detect=-1), "detect=-1"),
        (lambda: ChangeTimes(commit_pause=-1), "commit_pause is -1"),
    ],
)
def test_events_that_cannot_be_are_refused(make, words):
    with pytest.raises(PlannerError, match=words):
        make()


def test_fewer_than_one_worker_is_refused():
    with pytest.raises(PlannerError, match="0 attention"):
        simulate(
            Cluster(LAT, attention=1),
            long_requests(1),
            events=[Scale(1.0, attention=-1, relative=True)],
        )


EVENTS = st.lists(
    st.builds(
        Scale,
        at=st.floats(0, 2000),
        attention=st.none() | st.integers(1, 4),
        ffn=st.none() | st.integers(1, 4),
    )
    | st.builds(
        Failure,
        at=st.floats(0, 2000),
        role=st.sampled_from(["attention", "ffn"]),
        detect=st.floats(0, 100),
        recover=st.floats(0, 100),
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    events=EVENTS,
    boarding=st.sampled_from(["barrier", "asynchronous"]),
    prefill=st.sampled_from(["none", "colocated", "disaggregated"]),
    closed=st.booleans(),
    layers=st.sampled_from([1, 3]),
    lanes=st.sampled_from([1, 2]),
    prepare=st.sampled_from([0.0, 50.0]),
    pause=st.sampled_from([0.0, 7.0]),
    deadline=st.sampled_from([0.0, 40.0, math.inf]),
    seed=st.integers(0, 99),
)
def test_whatever_happens_no_request_is_lost_and_every_token_comes_once(
    events, boarding, prefill, closed, layers, lanes, prepare, pause, deadline, seed
):
    cluster = Cluster(
        LAT,
        attention=2,
        ffn=2,
        batch=3,
        boarding=boarding,
        layers=layers,
        lanes=lanes,
        prefill=prefill,
        prefill_workers=2 if prefill == "disaggregated" else 0,
        prefill_chunk=32,
        changes=ChangeTimes(prepare, prepare, pause, deadline),
    )
    load = Closed(LOAD, 25) if closed else Poisson(LOAD, 0.05, 60)
    # Whatever was lost, in the end there are workers to go on with.
    rescue = [Scale(5000.0, attention=2, ffn=2), Scale(6000.0, attention=2, ffn=2)]

    result = simulate(cluster, load, seed=seed, events=[*events, *rescue], keep_requests=True)

    assert result.arrived == result.completed
    assert result.in_flight == 0
    assert result.tokens == sum(record.output for record in result.requests)
    assert result.tokens == sum(result.series.tokens)
    assert sum(record.replays for record in result.requests) == result.replayed
    assert len({record.number for record in result.requests}) == result.completed
    for share in (result.idle_attention_run, result.idle_ffn_run):
        assert -1e-9 <= share <= 1 or math.isnan(share)
