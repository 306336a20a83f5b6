"""A floor from a forecast under another policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import registry
from autoscaler.limits import Counts, Limits
from autoscaler.model import Model
from autoscaler.policy import Policy, Proposal, View
from autoscaler.predict import predict_load, predict_ttft
from autoscaler.reasons import Reason
from planner.latency import Latencies, Linear
from tests.autoscaler.views import (
    NONSENSE,
    SYSTEM,
    TARGETS,
    all_limits,
    counts,
    snapshot,
    snapshots,
    view,
)

MODEL = Model(
    Latencies(Linear(1e-6, 0.001), Linear(2e-4, 0.001), Linear(1e-6, 0.0005)),
    theta=200.0,
    prompt_mean=100.0,
    output_mean=100.0,
)
WIDE = Limits((1, 12), (1, 12), max_step=12)
FOUR = Counts(4, 4)


def policy(inner: str = "static", **given: Any) -> Policy:
    whole = {"period": 10.0, "horizon": 60.0, "inner": {"policy": inner}, **given}
    return registry.make("predictive", whole)


def fed(
    judge: Policy,
    rates: Sequence[float],
    limits: Limits = WIDE,
    model: Model | None = None,
    seen: Callable[..., Any] = snapshot,
) -> Proposal:
    """Its word after one sample of the rate per period."""
    assert rates
    for period, rate in enumerate(rates):
        at = view(seen(now=10.0 * period + 5.0, arrival_rate=rate), limits, model=model)
        proposal = judge.propose(at)
    assert proposal is not None
    return proposal


RISING = [5.0 + 0.5 * period for period in range(20)]


def test_without_history_it_is_the_inner_policy():
    assert fed(policy(), RISING[:9]) == registry.make("static").propose(view())
    assert fed(policy(history=30), RISING).reason is Reason.AS_IT_IS


def test_a_rise_is_met_before_it_comes():
    # Half of the targets are used; the rate goes from 14.5 to about 17: 4 * 0.5 / 0.9 * 1.2.
    worse = lambda **given: snapshot(ttft=1.8, **given)  # noqa: E731
    proposal = fed(policy(), RISING, seen=worse)
    assert proposal.reason is Reason.FORECAST
    assert (proposal.attention, proposal.ffn) == (5, 5)
    assert "static wants 4A4F" in proposal.detail
    assert fed(policy(), RISING).reason is Reason.AS_IT_IS, "there is room for it"


def test_a_fall_lowers_nothing():
    falling = list(reversed(RISING))
    assert fed(policy(), falling, model=MODEL).reason is Reason.AS_IT_IS


@pytest.mark.parametrize("rate", [10.0, 50.0, 150.0])
def test_with_a_model_the_floor_holds_the_targets_with_the_fewest(rate: float):
    proposal = fed(policy(), [rate] * 20, model=MODEL, limits=replace(WIDE, attention=(2, 12)))
    floor = Counts(proposal.attention or 4, proposal.ffn or 4)

    def holds(at: Counts) -> bool:
        _, tpot = predict_load(MODEL, SYSTEM, *at, rate)
        ttft = predict_ttft(MODEL, SYSTEM, *at, rate)
        return tpot <= 0.9 * TARGETS.tpot and ttft <= 0.9 * TARGETS.ttft

    assert holds(floor)
    if floor != FOUR:
        fewer = [Counts(a, f) for a in range(2, 13) for f in range(1, 13) if a + f < floor.total]
        assert not any(holds(at) for at in fewer if at.attention >= 4 and at.ffn >= 4)


def test_with_a_model_more_load_never_means_fewer():
    totals = []
    for rate in (5.0, 40.0, 80.0, 160.0, 320.0, 1e4):
        proposal = fed(policy(), [rate] * 20, model=MODEL)
        totals.append((proposal.attention or 4) + (proposal.ffn or 4))
    assert totals == sorted(totals)
    assert totals[0] == 8
    assert totals[-1] == 24, "all there is, where nothing is enough"


def test_longer_requests_count_as_more():
    short = fed(policy(), [60.0] * 20, model=MODEL)
    longer = fed(
        policy(),
        [60.0] * 20,
        model=MODEL,
        seen=lambda **given: snapshot(prompt_mean=400.0, output_mean=400.0, **given),
    )
    assert (longer.attention or 4) + (longer.ffn or 4) > (short.attention or 4) + (short.ffn or 4)


def test_an_unreliable_model_is_not_asked():
    bad = replace(MODEL, reliable=False, why="40 % off")
    assert fed(policy(), [320.0] * 20, model=bad).reason is Reason.AS_IT_IS


@pytest.mark.parametrize("unknown", ["prompt_mean", "output_mean"])
def test_unknown_lengths_compare_rates_alone(unknown: str):
    seen = lambda **given: snapshot(ttft=1.8, **{**given, unknown: math.nan})  # noqa: E731
    assert fed(policy(), RISING, seen=seen).reason is Reason.FORECAST


def test_a_fixed_budget_has_no_floor():
    fixed = Limits(min_total=8, max_total=8)
    assert fed(policy(), [320.0] * 20, limits=fixed, model=MODEL).reason is Reason.AS_IT_IS


def test_the_floor_keeps_the_inner_policy_from_shrinking():
    light = lambda **given: snapshot(ttft=0.1, tpot=0.01, **given)  # noqa: E731
    alone = registry.make("slo_feedback")
    for _ in range(10):
        proposal = alone.propose(view(light(arrival_rate=120.0), WIDE))
    assert proposal.reason is Reason.SLO_SLACK
    under = fed(policy("slo_feedback"), [120.0] * 20, model=MODEL, seen=light)
    floor = fed(policy(), [120.0] * 20, model=MODEL, seen=light)
    for role in ("attention", "ffn"):
        assert (getattr(under, role) or 4) >= min(4, getattr(floor, role) or 4)


def test_a_pause_forgets_the_history():
    judge = policy()
    assert fed(judge, [320.0] * 20, model=MODEL).reason is Reason.FORECAST
    late = view(snapshot(now=5000.0, arrival_rate=320.0), WIDE, model=MODEL)
    assert judge.propose(late).reason is Reason.AS_IT_IS


def test_a_season_is_foreseen():
    day = [20.0] * 10 + [300.0] * 10
    until_the_rush = (day * 3)[:48]
    floors = [fed(policy(season=season), until_the_rush, model=MODEL) for season in (200.0, None)]
    totals = [(floor.attention or 4) + (floor.ffn or 4) for floor in floors]
    assert totals[0] > totals[1]


@given(NONSENSE)
@settings(max_examples=30)
def test_nonsense_of_the_inner_policy_is_not_hidden(answer: object):
    judge = policy()
    fed(judge, [320.0] * 12, model=MODEL)

    class Inner:
        def propose(self, seen: View) -> object:
            return answer

    judge._inner = Inner()  # type: ignore[attr-defined]
    got = judge.propose(view(snapshot(now=126.0, arrival_rate=320.0), WIDE, model=MODEL))
    numbers = [getattr(got, role, "") for role in ("attention", "ffn")]
    assert got is answer or all(type(number) is int for number in numbers)


@settings(max_examples=10)
@given(all_limits(), st.data())
def test_never_fewer_than_the_inner_policy_wants(limits: Limits, data: st.DataObject):
    there = data.draw(counts(limits))
    judge, alone = policy("slo_feedback"), registry.make("slo_feedback")
    model = data.draw(st.sampled_from([None, MODEL]))
    for period in range(14):
        seen = data.draw(snapshots(there, now=10.0 * period))
        proposal = judge.propose(view(seen, limits, model=model))
        inner = alone.propose(view(seen, limits, model=model))
        for role in ("attention", "ffn"):
            here = getattr(there, role)
            wanted = getattr(proposal, role)
            assert wanted is None or type(wanted) is int
            assert (wanted or here) >= (getattr(inner, role) or here)
        if limits.fixed is not None:
            assert proposal == inner
