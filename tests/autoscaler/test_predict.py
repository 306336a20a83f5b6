"""Predictions beside the planner's simulator, beside exact cases, and what always holds of them."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoscaler.model import Model
from autoscaler.policy import System
from autoscaler.predict import (
    capacity,
    carries,
    context_of,
    predict_load,
    predict_step,
    predict_ttft,
    rebalance_gain,
    room,
    step_of,
)
from planner.control import Snapshot
from planner.curves import Linear, PiecewiseLinear, Tabulated
from planner.errors import PlannerError
from planner.latency import Latencies
from planner.loads import Closed, Poisson
from planner.simulator import Cluster, simulate
from planner.workload import Geometric, Independent
from tests.autoscaler.views import snapshot

LAYERS = 6
TIMES = Latencies(
    attention=Linear(1e-5 * LAYERS, 1e-3 * LAYERS),
    ffn=Linear(6e-4 * LAYERS, 1.5e-3 * LAYERS),
    transfer=Linear(1e-6 * LAYERS, 2e-4 * LAYERS),
    prefill=Linear(1e-5 * LAYERS, 0.0),
    outside=Linear(0.0, 4e-3),
)
MODEL = Model(TIMES, theta=200.0, prompt_mean=100.0, output_mean=100.0, layers=LAYERS)
SYSTEM = System(slots=64)


class Watching:
    """Notes contexts and token gaps as the simulation goes; changes nothing."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, int, float]] = []

    def decide(self, seen: Snapshot) -> None:
        if seen.itl.count:
            context = seen.kv_tokens / seen.batch
            self.rows.append(
                (context, seen.itl.mean, float(seen.itl.count), seen.running, seen.ttft.mean)
            )

    def mean(self, column: int) -> float:
        rows = np.array(self.rows[1:])  # the first window has the start in it
        return float(np.average(rows[:, column], weights=rows[:, 2]))


def watched(cluster: Cluster, load: Closed | Poisson, until: float) -> Watching:
    watching = Watching()
    simulate(cluster, load, until=until, policy=watching, interval=until / 8)
    return watching


def cluster(
    times: Latencies, attention: int, ffn: int, each: int, lanes: int, **more: Any
) -> Cluster:
    return Cluster(
        times,
        attention=attention,
        ffn=ffn,
        batch=each // lanes,
        lanes=lanes,
        boarding="asynchronous",
        steps="joint",
        layers=LAYERS,
        **more,
    )


# -- beside the simulator ------------------------------------------------------------------------

SPLITS = ((1, 1), (1, 3), (2, 1), (3, 1), (2, 2), (5, 3), (3, 5), (6, 2))


def errors(kernel: float, prompt: float, prefill: bool) -> list[float]:
    """Of predicted TPOT, over splits and batches, with so long a kernel whatever its load."""
    times = replace(TIMES, ffn=Linear(TIMES.ffn.slope(0), kernel * LAYERS))
    found = []
    for attention, ffn in SPLITS:
        for each, lanes in ((8, 1), (24, 2)):
            more: dict[str, Any] = {"prefill": "colocated"} if prefill else {}
            load = Closed(Independent(Geometric(prompt), Geometric(100)), None, stationary=True)
            seen = watched(cluster(times, attention, ffn, each, lanes, **more), load, 30.0)
            model = replace(
                MODEL,
                latencies=times,
                theta=seen.mean(0),
                lanes=lanes,
                prompt_mean=prompt if prefill else 0.0,
            )
            system = System(slots=each, lanes=lanes)
            predicted = predict_step(model, system, attention, ffn, attention * each)
            found.append(predicted / seen.mean(1) - 1)
    return found


@pytest.mark.parametrize(
    ("kernel", "prompt", "prefill"),
    [(0.3e-3, 30, False), (1.5e-3, 100, False), (5e-3, 30, False), (1.5e-3, 300, True)],
)
def test_steps_take_what_the_simulator_says(kernel: float, prompt: float, prefill: bool) -> None:
    off = [abs(error) for error in errors(kernel, prompt, prefill)]
    assert median(off) < 0.05
    assert max(off) < 0.16


def test_arrivals_settle_where_the_simulator_does() -> None:
    model = replace(MODEL, lanes=2)
    system = System(slots=24, lanes=2)
    for attention, ffn in ((3, 3), (5, 3)):
        most = capacity(model, system, attention, ffn, math.inf) / model.output_mean
        for share in (0.6, 0.85):
            load = Poisson(Independent(Geometric(100), Geometric(100)), share * most, None)
            seen = watched(cluster(TIMES, attention, ffn, 24, 2, prefill="colocated"), load, 600.0)
            running, tpot = predict_load(model, system, attention, ffn, share * most)
            # near saturation it errs on the long side, by a third at most here
            assert 0.95 < tpot / seen.mean(1) < 1.4
            assert 0.95 < running / seen.mean(3) < 1.45
            first = predict_ttft(model, system, attention, ffn, share * most)
            assert first == pytest.approx(seen.mean(4), rel=0.3)


# -- exact cases ---------------------------------------------------------------------------------


def quiet(**given: Any) -> Model:
    """Without prompts, so that a step is only a step."""
    return replace(MODEL, prompt_mean=math.nan, **given)


def test_one_lane_alone_takes_its_round_trip() -> None:
    tokens = 10 * 200.0
    expected = TIMES.t_attention(tokens, 10) + TIMES.t_ffn(10) + TIMES.t_transfer(10) + 4e-3
    assert predict_step(quiet(), SYSTEM, 1, 1, 10) == pytest.approx(expected)


def test_lanes_hide_what_attention_covers() -> None:
    model = quiet(lanes=2, theta=2000.0, layers=10_000)
    step = step_of(model, System(64, lanes=2), 1, 4, 20)
    assert step.bound_by == "attention"
    assert step.seconds == pytest.approx(2 * TIMES.t_attention(20_000, 10) + 4e-3, rel=1e-3)


def test_experts_that_are_asked_too_much_bound_a_step() -> None:
    model = quiet(theta=0.0)
    step = step_of(model, SYSTEM, 8, 1, 400)
    assert step.bound_by == "ffn"
    work = 400 * TIMES.ffn.slope(0)
    assert work < step.seconds < work + 8 * TIMES.ffn.intercept + 1e-9


def test_fewer_requests_than_workers_leave_some_idle() -> None:
    alone = predict_step(quiet(), SYSTEM, 1, 1, 1)
    assert predict_step(quiet(), SYSTEM, 8, 1, 1) == pytest.approx(alone)


def test_prompts_take_their_part_of_a_step() -> None:
    # every request brings one prompt of 50 uncached tokens in 100 steps
    model = replace(MODEL, prefix_hit=0.5)
    prompt = TIMES.t_prefill(50) + 50 * TIMES.ffn.slope(0) + 50 * TIMES.transfer.slope(0)
    assert predict_step(model, SYSTEM, 1, 1, 10) - predict_step(
        quiet(), SYSTEM, 1, 1, 10
    ) == pytest.approx(10 / 100 * prompt)


def test_imbalance_counts_with_several_ffn_workers_only() -> None:
    even, uneven = quiet(), quiet(imbalance=1.5)
    assert predict_step(uneven, SYSTEM, 1, 1, 10) == predict_step(even, SYSTEM, 1, 1, 10)
    assert predict_step(uneven, SYSTEM, 1, 2, 10) > predict_step(even, SYSTEM, 1, 2, 10)


def test_tokens_travel_to_the_workers_that_hold_their_experts() -> None:
    wide = replace(TIMES, transfer=Linear(1.0, 0.0))
    model = quiet(latencies=wide)
    everywhere = predict_step(model, System(64), 1, 4, 10)
    some = predict_step(model, System(64, top_k=2, experts=64), 1, 4, 10)
    assert some < 0.6 * everywhere
    # a fraction that has no meaning is left out
    assert predict_step(model, System(64, top_k=2, experts=3), 1, 4, 10) == everywhere


def test_the_barrier_form_looks_at_the_longest_contexts() -> None:
    model = quiet(nu2=200.0**2)
    mean = predict_step(model, SYSTEM, 4, 2, 40)
    slowest = predict_step(model, SYSTEM, 4, 2, 40, "barrier")
    extra = 1.0491 * 200.0 / math.sqrt(10) * 10 * TIMES.attention.slope(0)
    assert slowest - mean == pytest.approx(extra, rel=0.15)
    assert predict_step(model, SYSTEM, 1, 2, 40, "barrier") == predict_step(model, SYSTEM, 1, 2, 40)
    assert predict_step(quiet(), SYSTEM, 4, 2, 40, "barrier") == mean  # nobody knows how they vary


def test_lanes_that_are_chosen_are_the_quickest() -> None:
    model = quiet(theta=2000.0, lanes=1)
    chosen = predict_step(model, System(64, lanes=4), 1, 1, 32)
    fixed = [
        predict_step(replace(model, lanes=lanes), System(64, lanes=lanes), 1, 1, 32)
        for lanes in (1, 2, 3, 4)
    ]
    assert chosen == min(fixed)
    few = predict_step(model, System(64, lanes=4), 1, 1, 7)  # too few for two lanes
    assert few == predict_step(model, System(64, lanes=1), 1, 1, 7)


def test_the_load_is_a_fixed_point_and_somewhat_more() -> None:
    running, tpot = predict_load(MODEL, SYSTEM, 4, 3, 2.0)
    assert running == pytest.approx(2.0 * 100 * tpot)
    assert 1.0 <= tpot / predict_step(MODEL, SYSTEM, 4, 3, running) < 1.1, "ups and downs cost"
    assert predict_load(MODEL, SYSTEM, 4, 3, 0.0)[0] == pytest.approx(0.0, abs=1e-6)


def test_what_can_not_follow_says_so() -> None:
    assert predict_load(MODEL, SYSTEM, 1, 1, 1e4) == (math.inf, math.inf)
    assert predict_load(MODEL, replace(SYSTEM, slots=1), 1, 1, 3.0) == (math.inf, math.inf)
    assert predict_ttft(MODEL, SYSTEM, 1, 1, 1e4) == math.inf
    unknown = replace(MODEL, output_mean=math.nan)
    assert all(map(math.isnan, predict_load(unknown, SYSTEM, 1, 1, 1.0)))
    assert math.isnan(predict_ttft(unknown, SYSTEM, 1, 1, 1.0))


def test_slots_in_short_supply_make_requests_wait() -> None:
    roomy = predict_ttft(MODEL, System(64), 2, 2, 1.0)
    running, _ = predict_load(MODEL, System(64), 2, 2, 1.0)
    tight = predict_ttft(MODEL, System(math.ceil(running / 2 * 1.05)), 2, 2, 1.0)
    assert roomy < 1.0 and tight > roomy + 0.1


def test_room_is_slots_or_contexts() -> None:
    assert room(MODEL, System(64), 3) == 192
    assert room(MODEL, System(64, kv_tokens=2000), 3) == 30
    assert room(MODEL, System(64, kv_tokens=10), 3) == 3  # one has to run


def test_contexts_come_from_the_best_that_is_known() -> None:
    assert context_of(MODEL) == 200.0
    assert context_of(replace(MODEL, theta=math.nan)) == 150.0
    assert context_of(replace(MODEL, theta=math.nan, output_mean=math.nan)) == 100.0
    assert context_of(Model(TIMES)) == 0.0


def test_a_better_balance_saves_a_share_of_a_step() -> None:
    seen = snapshot(running=200)
    model = replace(MODEL, theta=20.0)
    gain = rebalance_gain(model, SYSTEM, seen, 2.0, 1.0)
    assert 0.1 < gain < 0.6
    for before, after in ((1.0, 1.0), (1.0, 2.0), (math.nan, 1.0), (2.0, math.nan)):
        assert rebalance_gain(model, SYSTEM, seen, before, after) == 0.0
    for change in ({"running": 0}, {"ffn": 1}, {"attention": 0}):
        assert rebalance_gain(model, SYSTEM, replace(seen, **change), 2.0, 1.0) == 0.0


def test_bad_questions_are_refused() -> None:
    for counts in ((0, 1), (1, 0)):
        with pytest.raises(PlannerError, match="serve nobody"):
            predict_step(MODEL, SYSTEM, *counts, 10)
    table = replace(TIMES, ffn=Tabulated(((1.0, 0.1), (8.0, 0.2))))
    with pytest.raises(PlannerError):
        predict_step(replace(MODEL, latencies=table), SYSTEM, 4, 1, 200)


# -- always --------------------------------------------------------------------------------------

lines = st.builds(Linear, st.floats(0, 1e-2), st.floats(0, 1e-2))
models = st.builds(
    Model,
    st.builds(
        Latencies,
        attention=st.builds(Linear, st.floats(0, 1e-4), st.floats(1e-4, 1e-2)),
        ffn=lines | st.just(PiecewiseLinear(((0.0, 0.001), (8.0, 0.01), (64.0, 0.02)))),
        transfer=lines,
        prefill=st.builds(Linear, st.floats(0, 1e-3)),
        outside=lines,
        weights_share=st.sampled_from((0.0, 0.7)),
    ),
    theta=st.floats(1, 1e4),
    nu2=st.just(math.nan) | st.floats(0, 1e6),
    prompt_mean=st.just(math.nan) | st.floats(1, 1e4),
    output_mean=st.floats(1, 1e3),
    prefix_hit=st.floats(0, 1),
    imbalance=st.floats(1, 3),
    lanes=st.integers(1, 3),
    layers=st.integers(1, 60),
)
systems = st.builds(
    System,
    slots=st.integers(1, 128),
    kv_tokens=st.none() | st.integers(1, 1_000_000),
    lanes=st.integers(1, 4),
    top_k=st.none() | st.integers(1, 8),
    experts=st.none() | st.integers(8, 64),
)
workers = st.integers(1, 8)
forms = st.sampled_from(("mean-field", "barrier"))


@settings(max_examples=300, deadline=None)
@given(models, systems, workers, workers, st.floats(0, 1000), st.floats(1, 3), forms)
def test_more_requests_of_one_lane_never_take_less_time_nor_put_out_less(
    model: Model, system: System, a: int, f: int, running: float, more: float, form: Any
) -> None:
    # Of more lanes neither holds: few requests are not split, and their step may be the longer one.
    # Nor of a curve that flattens: larger rides at the FFN workers are served better.
    ffn = model.latencies.ffn if isinstance(model.latencies.ffn, Linear) else Linear(1e-3, 1e-3)
    latencies = replace(model.latencies, ffn=ffn)
    model, system = replace(model, latencies=latencies, lanes=1), replace(system, lanes=1)
    few = predict_step(model, system, a, f, running, form)
    many = predict_step(model, system, a, f, running * more, form)
    assert 0 < few < math.inf
    if form == "mean-field":
        assert many >= few * (1 - 1e-6)
    shown = min(running, room(model, system, a)), min(running * more, room(model, system, a))
    assume(shown[0] >= 1)
    # near the bound of the FFN workers rides of another size may serve a trifle better
    assert shown[1] / many >= shown[0] / few * 0.9


@settings(max_examples=100, deadline=None)
@given(models, systems, workers, workers, st.floats(0.01, 100), st.floats(1.01, 4))
def test_more_arrivals_never_mean_less_load(
    model: Model, system: System, a: int, f: int, rate: float, more: float
) -> None:
    running, tpot = predict_load(model, system, a, f, rate)
    running_more, tpot_more = predict_load(model, system, a, f, rate * more)
    assert running_more >= running * (1 - 1e-6) and tpot_more >= tpot * (1 - 1e-6)
    assert running <= room(model, system, a) or running == math.inf


@settings(max_examples=200, deadline=None)
@given(models, systems, workers, workers, st.floats(1e-3, 1), st.floats(0.3, 3))
def test_capacity_is_what_is_carried(
    model: Model, system: System, a: int, f: int, tpot: float, share: float
) -> None:
    most = capacity(model, system, a, f, tpot)
    assert 0 <= most < math.inf
    assume(most > 0 and not 0.9 < share < 1.1)
    assert carries(model, system, a, f, most * share, tpot) == (share < 1)


@settings(max_examples=100, deadline=None)
@given(models, systems, workers, workers, st.floats(1e-3, 1), st.floats(1, 3))
def test_a_looser_target_never_carries_less(
    model: Model, system: System, a: int, f: int, tpot: float, looser: float
) -> None:
    tight = capacity(model, system, a, f, tpot)
    assert capacity(model, system, a, f, tpot * looser) >= tight * 0.9
