"""The closed loop: the papers' model against closed forms, limits and common sense."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.latency import PRESETS, Latencies, Linear
from planner.loads import Arrival, Arrivals, Closed, Poisson
from planner.simulator import Cluster, Result, simulate
from planner.spans import to_chrome_trace
from planner.workload import Fixed, Geometric, Independent

PAPER = PRESETS["deepseek-v3-npu"]
NPU_LOAD = Independent(Fixed(100), Geometric(50))
ONE_TOKEN = Independent(Fixed(100), Fixed(1))
FREE = Linear(0.0, 0.0)


def constant(attention: float, transfer: float, ffn: float) -> Latencies:
    return Latencies(Linear(0, attention), Linear(0, ffn), Linear(0, transfer), unit="ms")


def run(cluster: Cluster, load: Closed | None = None, **kwargs) -> Result:
    return simulate(cluster, load or Closed(NPU_LOAD, 200), **kwargs)


@pytest.mark.parametrize(
    ("attention", "transfer", "ffn", "lanes", "tau"),
    [
        (10, 2, 4, 2, 10),  # attention sets the pace
        (4, 2, 10, 2, 10),  # the experts do
        (4, 6, 4, 2, 7),  # a lane's own round trip does: (4 + 6 + 4) / 2
        (4, 6, 4, 4, 4),  # with lanes enough it doesn't
        (10, 2, 4, 1, 16),  # one lane: everything in turn
    ],
)
@pytest.mark.parametrize("layers", [1, 5])
def test_steady_load_steps_as_the_closed_form_says(attention, transfer, ffn, lanes, tau, layers):
    cluster = Cluster(
        constant(attention, transfer, ffn), attention=3, batch=8, lanes=lanes, layers=layers
    )

    result = run(cluster, Closed(NPU_LOAD, 400))

    # Every lane steps once per lanes * tau; only the first steps, in which the lanes find their
    # places, may differ.
    assert result.itl.p50 == pytest.approx(lanes * tau, rel=0.011)
    assert result.step_time == pytest.approx(lanes * tau, rel=0.01)
    assert result.throughput == pytest.approx(3 * 8 / tau, rel=0.02)
    assert result.idle_attention == pytest.approx(1 - attention / tau, abs=0.01)
    assert result.idle_ffn == pytest.approx(1 - ffn / tau, abs=0.01)
    assert result.per_instance == pytest.approx(result.throughput / 4)


@pytest.mark.parametrize("boarding", ["barrier", "asynchronous"])
def test_one_lane_of_one_worker_takes_exactly_the_sum_of_its_stages(boarding):
    # Every slot holds a request of one token, so the load is the same in every step.
    cluster = Cluster(PAPER, attention=1, batch=16, lanes=1, boarding=boarding)

    result = run(cluster, Closed(ONE_TOKEN, 160))

    step = PAPER.t_attention(1600.0) + PAPER.t_ffn(16.0) + PAPER.t_transfer(16.0)
    assert result.makespan == pytest.approx(10 * step, rel=1e-12)
    assert result.tokens == 160
    assert result.steps == result.calls == 10
    assert result.ttft.least == pytest.approx(step, rel=1e-12)
    assert result.tpot.count == 0


def test_a_request_of_d_tokens_takes_the_sum_over_its_growing_context():
    cluster = Cluster(PAPER, attention=1, batch=1, lanes=1)

    result = run(cluster, Closed(Independent(Fixed(10), Fixed(7)), 1))

    contexts = range(10, 17)
    step = PAPER.t_ffn(1.0) + PAPER.t_transfer(1.0)
    expected = sum(PAPER.t_attention(float(t)) + step for t in contexts)
    assert result.makespan == pytest.approx(expected, rel=1e-12)
    assert result.theta == pytest.approx(13.0)
    assert result.nu2 == pytest.approx(4.0)


def test_without_transfer_the_slower_side_sets_the_pace():
    free = replace(PAPER, transfer=FREE)
    # theta of the stationary load is 100 + 49
    attention = free.t_attention(64 * 149.0)
    ffn = free.t_ffn(4 * 64.0)

    result = run(
        Cluster(free, attention=4, batch=64), Closed(NPU_LOAD, 3000, stationary=True), seed=1
    )

    assert attention < ffn
    assert result.throughput == pytest.approx(4 * 64 / ffn, rel=0.01)
    assert result.idle_ffn < 0.01


def test_with_ever_more_attention_workers_the_experts_marginal_rate_is_the_limit():
    marginal = 1 / 0.083
    load = Closed(NPU_LOAD, None, stationary=True)
    rates = [
        simulate(Cluster(PAPER, attention=workers), load, until=60e3).throughput
        for workers in (8, 32, 64)
    ]

    assert rates == sorted(rates)
    assert rates[-1] < marginal
    assert rates[-1] == pytest.approx(marginal * (64 * 256) / (64 * 256 + 100 / 0.083), rel=0.04)


def test_ffn_workers_share_the_load_and_the_weights():
    lat = replace(constant(0, 0, 0), ffn=Linear(1.0, 8.0), weights_share=0.5)

    result = run(
        Cluster(lat, attention=1, ffn=2, batch=4, lanes=1, imbalance=1.5), Closed(ONE_TOKEN, 40)
    )

    # 4 requests: 4 * 1.5 / 2 at the busiest worker; half of the intercept is weights, half of
    # which are here.
    assert result.step_time == pytest.approx(3.0 + 4.0 + 2.0)


def test_transfer_may_depend_on_one_attention_workers_requests():
    lat = replace(constant(0, 0, 0), transfer=Linear(1.0, 0.0))
    cluster = Cluster(lat, attention=3, batch=4, lanes=1)

    of_ffn = run(cluster, Closed(ONE_TOKEN, 40))
    own = run(replace(cluster, latencies=replace(lat, transfer_load="attention")))

    assert of_ffn.step_time == pytest.approx(12.0)
    assert own.step_time == pytest.approx(4.0, rel=0.1)


def test_blocking_sends_keep_the_sender():
    cluster = Cluster(constant(10, 4, 3), attention=2, batch=8, sends="blocking")

    result = run(cluster)

    assert result.step_time == pytest.approx(2 * (10 + 2), rel=0.01)
    assert result.idle_attention == pytest.approx(1 - 10 / 12, abs=0.01)


def test_the_slowest_worker_gates_a_barrier_step_only():
    cluster = Cluster(replace(PAPER, ffn=FREE, transfer=FREE), attention=16, batch=16, lanes=1)
    load = Closed(Independent(Fixed(0), Geometric(500)), 60)

    barrier = run(cluster, load)
    alone = run(replace(cluster, boarding="asynchronous"), load)

    assert barrier.idle_attention > 0.03
    assert alone.idle_attention < 0.01
    assert alone.throughput > barrier.throughput


def test_asynchronous_frames_board_the_same_call():
    cluster = Cluster(PAPER, attention=8, batch=64, boarding="asynchronous")

    result = run(cluster)

    assert result.calls < result.steps / 2
    assert result.completed == 8 * 200


@pytest.mark.parametrize("boarding", ["barrier", "asynchronous"])
def test_the_same_seed_gives_the_same_result_to_the_bit(boarding):
    cluster = Cluster(PAPER, attention=3, batch=16, boarding=boarding)

    first = run(cluster, seed=5, keep_requests=True, spans=4)
    again = run(cluster, seed=5, keep_requests=True, spans=4)
    other = run(cluster, seed=6, keep_requests=True, spans=4)

    assert first == again
    assert first != other


def test_a_worker_draws_the_same_requests_however_many_there_are():
    def drawn(workers: int) -> list[tuple[int, int]]:
        result = run(Cluster(PAPER, attention=workers, batch=16), keep_requests=True)
        return sorted((r.prompt, r.output) for r in result.requests if r.worker == 0)

    assert drawn(1) == drawn(5)


def test_idle_shares_and_optimum_follow_the_paper():
    load = Closed(Independent(Fixed(100), Geometric(100)), 1000)
    results = {r: run(Cluster(PAPER, attention=r, batch=256), load) for r in (1, 2, 3, 4, 8)}

    # r* = 2.17 for (100, 100) in the paper
    best = max(results, key=lambda r: results[r].per_instance)
    assert best in (2, 3)
    idle = [results[r].idle_attention for r in (1, 2, 3, 4, 8)]
    assert idle == sorted(idle)
    idle = [results[r].idle_ffn for r in (1, 2, 3, 4, 8)]
    assert idle == sorted(idle, reverse=True)


def test_a_stationary_start_has_the_load_of_the_long_run():
    load = Closed(Independent(Fixed(0), Geometric(300)), None, stationary=True)
    cluster = Cluster(replace(PAPER, ffn=FREE, transfer=FREE), attention=4, batch=256, lanes=1)
    steps = 20

    result = simulate(cluster, load, until=steps * PAPER.t_attention(256 * 299.0))

    assert result.steps == pytest.approx(steps, abs=2)
    assert result.in_flight == 4 * 256


def test_what_a_window_leaves_out():
    result = run(Cluster(PAPER, attention=2, batch=32), Closed(NPU_LOAD, 500), keep_requests=True)

    assert 0 < result.window < result.makespan
    assert result.throughput_completed < result.throughput
    done = sum(r.finished <= result.window for r in result.requests)
    assert done == pytest.approx(800, abs=64)
    assert result.idle_attention_run > result.idle_attention


def test_series_add_up_and_stay_small():
    result = run(Cluster(PAPER, attention=2, batch=8, lanes=1), Closed(NPU_LOAD, 1000))
    series = result.series

    assert len(series.times) <= 512
    assert sum(series.tokens) == result.tokens
    assert sum(series.completed) == sum(series.arrived) == 2000
    assert series.times[-1] <= result.makespan < series.times[-1] + series.width
    assert set(series.attention) == {2} and set(series.ffn) == {1}
    assert len({len(v) for v in (series.tokens, series.running, series.waiting)}) == 1


def test_spans_show_the_states_of_a_step_and_load_as_a_chrome_trace():
    cluster = Cluster(constant(4, 2, 3), attention=2, batch=4)

    result = run(cluster, spans=4)

    attention = [s for s in result.spans if s.phase == "attention"]
    assert {s.worker for s in attention} == {"A0", "A1"}
    assert len(attention) == 8
    first = [s for s in result.spans if s.lane == 0 and s.worker in ("A", "A0", "F")][:4]
    assert [(s.phase, s.start, s.duration) for s in first] == [
        ("attention", 0, 4),
        ("a2f", 4, 1),
        ("ffn", 5, 3),
        ("f2a", 8, 1),
    ]
    ffn = sorted((s.start, s.start + s.duration) for s in result.spans if s.phase == "ffn")
    assert all(end <= start for (_, end), (start, _) in pairwise(ffn))
    trace = json.loads(json.dumps(to_chrome_trace(result.spans, result.unit)))
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == len(result.spans)


@settings(max_examples=25, deadline=None)
@given(
    workers=st.integers(1, 5),
    batch=st.integers(1, 12),
    lanes=st.integers(1, 3),
    boarding=st.sampled_from(["barrier", "asynchronous"]),
    prefill=st.sampled_from(["none", "colocated", "disaggregated"]),
    requests=st.integers(1, 60),
    stationary=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_request_starts_and_completes_and_every_token_comes_once(
    workers, batch, lanes, boarding, prefill, requests, stationary, seed
):
    cluster = Cluster(
        replace(PAPER, prefill=Linear(0.5, 3.0)),
        attention=workers,
        batch=batch,
        lanes=lanes,
        boarding=boarding,
        prefill=prefill,
        prefill_workers=2 if prefill == "disaggregated" else 0,
        prefill_chunk=64,
    )

    result = simulate(
        cluster, Closed(NPU_LOAD, requests, stationary), seed=seed, keep_requests=True
    )

    assert result.arrived == result.completed == workers * requests
    assert result.in_flight == result.rejected == result.replayed == 0
    assert sum(result.series.tokens) == result.tokens
    asked = sum(record.output for record in result.requests)
    assert result.tokens <= asked if stationary else result.tokens == asked
    assert sorted(r.number for r in result.requests) == list(range(workers * requests))
    if not stationary:
        assert result.ttft.count == result.completed
        assert result.itl.count == result.tokens - result.completed


@settings(max_examples=25, deadline=None)
@given(
    stage=st.sampled_from(["attention", "ffn", "transfer"]),
    workers=st.integers(1, 6),
    factor=st.floats(1.0, 5.0),
    seed=st.integers(0, 99),
)
def test_a_slower_stage_never_ends_earlier(stage, workers, factor, seed):
    cluster = Cluster(PAPER, attention=workers, batch=8)
    slower = replace(cluster, latencies=PAPER.scaled(**{stage: factor}))
    load = Closed(NPU_LOAD, 40)

    fast, slow = (simulate(c, load, seed=seed) for c in (cluster, slower))

    assert slow.makespan >= fast.makespan * (1 - 1e-12)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"attention": 0}, "attention is 0"),
        ({"ffn": -1}, "ffn is -1"),
        ({"batch": 2.5}, "batch is 2.5"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"boarding": "bus"}, "boarding is 'bus'"),
        ({"sends": "never"}, "sends is 'never'"),
        ({"prefill": "magic"}, "prefill is 'magic'"),
        ({"prefill": "disaggregated"}, "0 prefill workers"),
        ({"prefill_workers": 2}, "2 prefill workers"),
        ({"kv_tokens": 0}, "kv_tokens is 0"),
        ({"max_queue": -1}, "max_queue is -1"),
    ],
)
def test_clusters_that_cannot_be_are_refused(wrong, words):
    with pytest.raises(PlannerError, match=words):
        Cluster(**{"latencies": PAPER, "attention": 1, **wrong})


@pytest.mark.parametrize(
    ("load", "settings_", "words"),
    [
        (Closed(NPU_LOAD, None), {}, "give until"),
        (Poisson(NPU_LOAD, 1.0, None), {}, "give until"),
        (Closed(NPU_LOAD, 5), {"until": 0}, "until is 0"),
        (Closed(NPU_LOAD, 5), {"interval": 3.0}, "interval is 3.0"),
        (Arrivals([Arrival(0, 1, 1)], unit="s"), {}, "'cycles'"),
        (Arrivals([Arrival(1, 1, 1), Arrival(0, 1, 1)]), {}, "must not fall"),
        (Arrivals([Arrival(1, 1, 0)]), {}, "outputs >= 1"),
    ],
)
def test_loads_that_do_not_fit_are_refused(load, settings_, words):
    with pytest.raises(PlannerError, match=words):
        simulate(Cluster(PAPER, attention=1), load, **settings_)


def test_kv_room_and_queues_are_refused_for_a_closed_loop():
    with pytest.raises(PlannerError, match="open loops"):
        run(Cluster(PAPER, attention=1, kv_tokens=1000))
