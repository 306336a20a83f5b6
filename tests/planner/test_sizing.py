"""Best ratios: closed forms against a search, the forms against each other, and limits."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.latency import PRESETS, Latencies, Linear, PiecewiseLinear, Tabulated
from planner.moments import Moments
from planner.sizing import (
    Setting,
    candidates,
    finite_horizon_output,
    optimum,
    point,
    points,
    size,
    v1_ratio,
    with_moments,
)

NPU = PRESETS["deepseek-v3-npu"]
GEOMETRIC = Moments(theta=600.0, nu2=250_000.0, prompt_mean=100.0, output_mean=500.0)
BASE = Setting(GEOMETRIC, NPU, batch=256)


def settings_of() -> st.SearchStrategy[Setting]:
    """Any linear system whose optimum is between 0.01 and 1000."""

    def build(b, theta, nu, a_a, b_a, a_f, b_f, a_c, b_c, price, load) -> Setting:
        latencies = Latencies(
            Linear(a_a, b_a), Linear(a_f, b_f), Linear(a_c, b_c), transfer_load=load
        )
        moments = Moments(theta, (nu * theta) ** 2, theta / 2, theta / 2)
        return Setting(moments, latencies, b, price_ffn=price)

    return st.builds(
        build,
        st.integers(1, 1024),
        st.floats(1, 20_000),
        st.floats(0, 2),
        st.floats(1e-5, 1e-2),
        st.floats(1, 200),
        st.floats(1e-3, 1),
        st.floats(1, 500),
        st.floats(1e-4, 0.2),
        st.floats(0.1, 200),
        st.floats(0.2, 5),
        st.sampled_from(["ffn", "attention"]),
    )


@settings(max_examples=80, deadline=None)
@given(setting=settings_of(), ffn=st.sampled_from([1, 2, 5]))
def test_closed_form_is_the_numeric_maximum(setting: Setting, ffn: int) -> None:
    best = optimum(setting, "mean-field", ffn)
    assert best.candidates
    ratios = np.geomspace(best.ratio / 50, best.ratio * 50, 4001)
    found = points(setting, ratios * ffn, ffn, "mean-field").per_cost
    assert best.point.per_cost >= found.max() * (1 - 1e-12)


@settings(max_examples=25, deadline=None)
@given(setting=settings_of())
def test_search_finds_the_closed_form(setting: Setting) -> None:
    closed = optimum(setting, "mean-field")
    assume(1.0 < closed.ratio < 1e4)
    # without a spread of the loads the barrier is the mean field, and it has no closed form
    searched = optimum(with_moments(setting, nu2=0.0), "barrier")
    assert searched.point.per_cost == pytest.approx(closed.point.per_cost, rel=1e-6)


@settings(max_examples=25, deadline=None)
@given(setting=settings_of(), attention=st.floats(1, 100))
def test_barrier_tends_to_the_mean_field(setting: Setting, attention: float) -> None:
    mean_field = point(setting, attention, form="mean-field").tau
    taus = [
        point(with_moments(setting, nu2=setting.moments.nu2 * k), attention).tau
        for k in (1.0, 1e-2, 1e-4, 0.0)
    ]
    assert all(tau >= mean_field * (1 - 1e-9) for tau in taus)
    assert taus == sorted(taus, reverse=True) or taus == pytest.approx(sorted(taus, reverse=True))
    assert taus[-1] == pytest.approx(mean_field)


@settings(max_examples=25, deadline=None)
@given(setting=settings_of(), factor=st.floats(1.05, 4))
def test_more_context_wants_more_attention(setting: Setting, factor: float) -> None:
    longer = with_moments(setting, theta=setting.moments.theta * factor)
    assert optimum(longer, "mean-field").ratio >= optimum(setting, "mean-field").ratio * (1 - 1e-9)


@settings(max_examples=25, deadline=None)
@given(setting=settings_of(), factor=st.floats(1.05, 4))
def test_slower_experts_want_less_attention(setting: Setting, factor: float) -> None:
    # with a transfer it needn't be: between its optimum and that of the FFN side there is a jump
    quiet = replace(setting.latencies, transfer=Linear(0.0, 0.0))
    setting = replace(setting, latencies=quiet)
    slower = replace(setting, latencies=replace(quiet, ffn=quiet.ffn.scaled(slope=factor)))
    assert optimum(slower, "mean-field").ratio <= optimum(setting, "mean-field").ratio * (1 + 1e-9)


def test_the_same_monotony_with_the_barrier() -> None:
    by_theta = [optimum(with_moments(BASE, theta=t)).ratio for t in (300, 600, 1200, 5000)]
    assert by_theta == sorted(by_theta)
    slow = [replace(NPU, ffn=Linear(a, 100.0)) for a in (0.05, 0.083, 0.2, 1.0)]
    by_slope = [optimum(replace(BASE, latencies=lat)).ratio for lat in slow]
    assert by_slope == sorted(by_slope, reverse=True)


def test_limit_of_many_attention_workers() -> None:
    far = points(BASE, [1e3, 1e4, 1e5], form="barrier")
    # the FFN side makes 1/a_F tokens per time, whatever stands in front of it
    assert far.throughput[-1] == pytest.approx(1 / 0.083, rel=1e-3)
    assert far.per_instance[-1] < 1e-3
    assert far.idle_ffn[-1] == pytest.approx(0.0)
    assert far.idle_attention[-1] > 0.99
    assert far.bound_by == ("ffn", "ffn", "ffn")


def test_limit_of_no_communication_and_equal_lengths() -> None:
    quiet = replace(NPU, transfer=Linear(0.0, 0.0))
    fixed = Setting(with_moments(BASE, nu2=0.0).moments, quiet, 256)
    at = point(fixed, 4.0)
    assert at.tau == pytest.approx(max(0.00165 * 256 * 600 + 50, 0.083 * 1024 + 100))
    assert at.throughput == pytest.approx(4 * 256 / at.tau)
    assert at.tpot == pytest.approx(2 * at.tau)
    assert at.bound_by == "attention"
    assert at.idle_attention == pytest.approx(0.0)
    assert at.idle_ffn == pytest.approx(1 - (0.083 * 1024 + 100) / at.tau)


def test_a_step_takes_a_share_of_the_round_trip() -> None:
    fixed = with_moments(BASE, nu2=0.0)
    trip = 303.44 + (0.022 * 2560 + 20) + (0.083 * 2560 + 100)
    for lanes in (1, 2, 3, 8):
        at = point(replace(fixed, lanes=lanes), 10.0)
        assert at.tau == pytest.approx(max(trip / lanes, 312.48), rel=1e-4)
        assert at.tpot == pytest.approx(lanes * at.tau)
    assert point(replace(fixed, lanes=2), 10.0).bound_by == "round trip"
    assert optimum(replace(BASE, lanes=2)).ratio < optimum(BASE).ratio
    assert not candidates(replace(BASE, lanes=2))


def test_lanes_average_what_a_worker_waits_for() -> None:
    # where attention is what takes long: 4 lanes of a worker differ by less than one
    idealised, four = point(BASE, 4.0).tau, point(replace(BASE, lanes=4), 4.0).tau
    mean = point(BASE, 4.0, form="mean-field").tau
    assert four - mean == pytest.approx((idealised - mean) / 2, rel=0.05)


def test_experts_on_several_workers() -> None:
    one, two = point(BASE, 8.0), point(BASE, 16.0, 2.0)
    assert two.ratio == one.ratio
    # the barrier is longer and every worker receives every token, but no less than half comes out
    assert one.throughput < two.throughput < 2 * one.throughput
    skewed = point(replace(BASE, imbalance=1.5), 40.0, 2.0)
    assert skewed.tau == pytest.approx(0.083 * 40 * 256 * 1.5 / 2 + 100, rel=1e-3)
    assert point(replace(BASE, imbalance=1.5), 40.0).tau == point(BASE, 40.0).tau
    sparse = replace(BASE, top_k=1)
    assert point(sparse, 16.0, 2.0).throughput >= two.throughput


def test_weights_are_read_by_share() -> None:
    lat = replace(NPU, weights_share=1.0)
    at = point(replace(BASE, latencies=lat), 200.0, 4.0)
    assert at.tau == pytest.approx(max(0.083 * 200 * 64 + 25, 0.022 * 200 * 256 + 20), rel=1e-3)


def test_prices_move_the_ratio() -> None:
    flat = replace(BASE, moments=replace(GEOMETRIC, theta=10.0, nu2=0.0))
    equal = optimum(flat, "mean-field")
    dear = optimum(replace(flat, price_ffn=4.0), "mean-field")
    assert equal.ratio == pytest.approx(math.sqrt(100 / (0.083 * 256)))
    assert dear.ratio == pytest.approx(2 * equal.ratio)


def test_skewed_contexts_make_the_barrier_longer() -> None:
    few = replace(BASE, batch=16)
    lopsided = replace(few, skewness=3.0)
    assert point(lopsided, 6.0).tau > point(few, 6.0).tau
    assert point(lopsided, 6.0).tau < 1.2 * point(few, 6.0).tau
    assert point(replace(few, skewness=1e-9), 6.0).tau == pytest.approx(point(few, 6.0).tau)
    # the mean is the same: a single worker doesn't wait
    quick = replace(NPU, ffn=Linear(0.001, 0.0), transfer=Linear(0.001, 0.0))
    alone = replace(lopsided, latencies=quick)
    assert point(alone, 1.0).tau == pytest.approx(
        point(alone, 1.0, form="mean-field").tau, rel=1e-3
    )


def test_curves_that_are_not_lines() -> None:
    bent = PiecewiseLinear(((0.0, 100.0), (2560.0, 312.48), (10_000.0, 5000.0)))
    setting = replace(BASE, latencies=replace(NPU, ffn=bent))
    best = optimum(setting)
    assert not best.candidates
    ratios = np.geomspace(0.5, 60, 3000)
    assert best.point.per_cost >= points(setting, ratios).per_cost.max() * (1 - 1e-9)
    assert size(setting).v1 is None


def test_tables_are_not_asked_beyond_their_ends() -> None:
    table = Tabulated(((256.0, 121.0), (8192.0, 780.0)))
    setting = replace(BASE, latencies=replace(NPU, ffn=table))
    assert optimum(setting).ratio == pytest.approx(optimum(BASE).ratio, rel=0.02)
    with pytest.raises(PlannerError, match="outside of the table"):
        point(setting, 64.0)
    context = Tabulated(((100_000.0, 215.0), (200_000.0, 380.0)))
    near = replace(BASE, latencies=replace(NPU, attention=context))
    assert point(near, 9.0).tau == pytest.approx(point(BASE, 9.0).tau, rel=0.01)


@pytest.mark.parametrize(
    ("batch", "prompt", "output", "published", "stationary"),
    [
        (128, 100, 500, 7.08, 7.22),
        (256, 100, 500, 9.34, 9.57),
        (512, 100, 500, 10.31, 10.75),
        (256, 100, 100, 2.17, 2.17),
        (256, 500, 500, 17.25, 17.53),
    ],
)
def test_v1_lands_on_the_published(
    batch: int, prompt: int, output: int, published: float, stationary: float
) -> None:
    age = finite_horizon_output(output, batch, 10_000)
    found = v1_ratio(batch, prompt, age, NPU)
    assert found.ratio == pytest.approx(published, rel=0.01)
    assert v1_ratio(batch, prompt, output, NPU).ratio == pytest.approx(stationary, rel=0.003)
    # the mean field has the same answer where the transfer binds neither
    moments = Moments(prompt + age, 0.0, prompt, age)
    mean_field = optimum(Setting(moments, NPU, batch), "mean-field")
    assert mean_field.ratio == pytest.approx(found.ratio, rel=1e-9)


def test_v1_regimes() -> None:
    assert v1_ratio(256, 100, 500, NPU).regime == "attention"
    assert v1_ratio(256, 100, 100, NPU).regime == "ffn"
    slow = replace(NPU, transfer=Linear(2.0, 20.0))
    assert v1_ratio(256, 100, 500, slow).regime == "transfer"


def test_size_tells_it_all() -> None:
    sizing = size(BASE)
    assert sizing.v1 is not None
    assert sizing.whole.attention == 10
    assert 0 in [n.loss for n in sizing.neighbours]
    assert all(0 <= n.loss < 1 for n in sizing.neighbours)
    counts = [n.point.attention for n in sizing.neighbours]
    assert counts == sorted(set(counts))
    data = sizing.to_dict()
    assert data["barrier"]["ratio"] == sizing.barrier.ratio
    assert data["given"]["unit"] == "cycles"


def test_whole_numbers_for_several_ffn_workers() -> None:
    whole = size(BASE, ffn=3).whole
    assert whole.ffn == 3 and whole.attention == round(whole.attention)
    every = points(BASE, np.arange(1, 100), 3).per_instance
    assert whole.per_instance == pytest.approx(every.max())


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"lanes": 0},
        {"imbalance": 0.5},
        {"top_k": 0},
        {"price_ffn": 0.0},
        {"price_attention": math.inf},
        {"skewness": math.nan},
    ],
)
def test_refuses_settings_that_make_no_sense(change: dict[str, float]) -> None:
    with pytest.raises(PlannerError, match=next(iter(change))):
        replace(BASE, **change)


def test_refuses_to_answer_without_a_best_ratio() -> None:
    free = replace(BASE, latencies=replace(NPU, ffn=Linear(0.0, 9.0), transfer=Linear(0.0, 1.0)))
    for setting in (free, replace(free, lanes=2)):
        with pytest.raises(PlannerError, match="no best ratio"):
            optimum(setting, "mean-field")
    with pytest.raises(PlannerError, match="no best ratio"):
        optimum(with_moments(free, nu2=0.0))
    # with a barrier there is one, far out: the slowest of more workers is slower
    assert optimum(free).ratio > 20
    with pytest.raises(PlannerError, match="no best ratio"):
        v1_ratio(256, 100, 500, free.latencies)


def test_refuses_bad_arguments() -> None:
    with pytest.raises(PlannerError, match="above 0"):
        points(BASE, [0.0, 1.0])
    with pytest.raises(PlannerError, match="form"):
        points(BASE, 1.0, form="guess")  # type: ignore[arg-type]
    with pytest.raises(PlannerError, match="requests"):
        finite_horizon_output(500, 256, 256)
    bent = replace(NPU, ffn=PiecewiseLinear(((0.0, 1.0), (1.0, 2.0))))
    with pytest.raises(PlannerError, match="linear"):
        v1_ratio(256, 100, 500, bent)
