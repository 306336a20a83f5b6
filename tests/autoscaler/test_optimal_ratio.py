"""Numbers by capacity: which it wants, what it refuses to touch, and what it never does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoscaler import registry
from autoscaler.limits import Counts, Limits
from autoscaler.model import Model
from autoscaler.policies.optimal_ratio import OptimalRatio
from autoscaler.policy import SLO, Proposal, System, View
from autoscaler.predict import capacity, predict_load, predict_step
from autoscaler.reasons import Reason
from planner.control import Snapshot
from planner.curves import Linear, Tabulated
from planner.latency import Latencies
from tests.autoscaler.views import all_limits, counts, snapshots

TARGETS = SLO(ttft=4.0, tpot=0.2)
SYSTEM = System(slots=64)
TIMES = Latencies(
    attention=Linear(6e-5, 4e-3),
    ffn=Linear(2.4e-3, 6e-3),
    transfer=Linear(1e-5, 1e-3),
    prefill=Linear(6e-5, 0.0),
)
MODEL = Model(TIMES, theta=200.0, prompt_mean=100.0, output_mean=100.0, layers=4)
EIGHT = Limits((1, 7), (1, 7), 8, 8)
FREE = Limits((1, 8), (1, 8))
SPLITS = [Counts(a, 8 - a) for a in range(1, 8)]


def policy(**parameters: Any) -> OptimalRatio:
    made = registry.make("optimal_ratio", parameters)
    assert isinstance(made, OptimalRatio)
    return made


def at_once() -> OptimalRatio:
    """Gives back without waiting whether less is enough for long."""
    return policy(stabilization=0)


def seen(
    there: tuple[int, int] = (4, 4), context: float = 200.0, rate: float = 5.0, **given: Any
) -> Snapshot:
    """A window in which 40 requests of so much context run."""
    facts: dict[str, Any] = {
        "running": 40,
        "arrival_rate": rate,
        "tokens_rate": min(rate, 8.0) * 100.0,
        "batch": 10.0,
        "kv_tokens": 10.0 * context,
    }
    return Snapshot(100.0, 20.0, *there, **{**facts, **given})


def view(snapshot: Snapshot, limits: Limits = EIGHT, **given: Any) -> View:
    return View(snapshot, TARGETS, limits, **{"system": SYSTEM, "model": MODEL, **given})


def wanted(proposal: Proposal, there: tuple[int, int]) -> Counts:
    a, f = proposal.attention, proposal.ffn
    return Counts(there[0] if a is None else a, there[1] if f is None else f)


def carried(split: Counts, context: float, **given: Any) -> float:
    model = replace(MODEL, theta=context, **given)
    return capacity(model, SYSTEM, *split, 0.85 * TARGETS.tpot, fill=0.9)


# -- a fixed budget ------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [50.0, 200.0, 600.0, 1500.0])
def test_the_split_that_carries_most_is_wanted(context: float) -> None:
    best = max(SPLITS, key=lambda split: carried(split, context))
    for there in SPLITS:
        proposal = policy(gain=0.0).propose(view(seen(there, context, rate=20.0)))
        got = wanted(proposal, there)
        assert carried(got, context) >= 0.97 * carried(best, context)


def test_longer_contexts_want_more_attention() -> None:
    short = policy().propose(view(seen((4, 4), 20.0, rate=20.0)))
    long = policy().propose(view(seen((4, 4), 1500.0, rate=20.0)))
    assert wanted(short, (4, 4)).attention < 4 < wanted(long, (4, 4)).attention
    assert short.reason is long.reason is Reason.RATIO
    assert "4A4F -> " in long.detail and "TPOT" in long.detail and "1510 tokens" in long.detail


def test_contexts_that_run_decide_before_those_that_ended() -> None:
    stale = replace(MODEL, theta=20.0, nu2=10.0)
    snapshot = seen((4, 4), 1500.0, rate=20.0, theta=20.0)
    assert wanted(policy().propose(view(snapshot, model=stale)), (4, 4)).attention > 4
    # nothing runs, or nobody knows: then those that ended
    for change in ({"batch": 0.0, "kv_tokens": 0.0}, {"batch": math.nan, "kv_tokens": math.nan}):
        idle = replace(snapshot, **change)
        assert wanted(policy().propose(view(idle, model=stale)), (4, 4)).attention < 4


def test_what_carries_most_holds_the_target_at_every_load_that_any_split_holds() -> None:
    """The reason for capacity: the least TPOT of a light load may hold less of a heavy one."""
    model = replace(MODEL, prompt_mean=math.nan)
    best = max(SPLITS, key=lambda split: carried(split, 200.0, prompt_mean=math.nan))
    for running in (8, 40, 80, 120, 160, 200):
        times = {
            split: predict_step(model, SYSTEM, *split, running)
            for split in SPLITS
            if running <= 64 * split.attention
        }
        if min(times.values()) <= 0.85 * TARGETS.tpot * 0.98:
            assert times[best] <= 0.85 * TARGETS.tpot
    light = min(SPLITS, key=lambda split: predict_step(model, SYSTEM, *split, 8))
    assert light != best
    assert carried(light, 200.0, prompt_mean=math.nan) < 0.95 * carried(
        best, 200.0, prompt_mean=math.nan
    )


def test_the_load_itself_changes_nothing() -> None:
    for rate, running in ((4.0, 20), (8.0, 60), (16.0, 180)):
        got = [
            wanted(policy().propose(view(seen(there, rate=rate, running=running))), there)
            for there in ((4, 4),)
        ]
        assert got == [wanted(policy().propose(view(seen((4, 4), rate=6.0))), (4, 4))]


def test_a_small_gain_is_none() -> None:
    best = max(SPLITS, key=lambda split: carried(split, 200.0))
    near = min(
        (split for split in SPLITS if split != best),
        key=lambda split: abs(split.attention - best.attention),
    )
    gain = carried(best, 200.0) / carried(near, 200.0) - 1
    snapshot = seen(near, rate=20.0)
    assert wanted(policy(gain=gain + 0.05).propose(view(snapshot)), near) == near
    assert wanted(policy(gain=max(0.0, gain - 0.05)).propose(view(snapshot)), near) != near


def test_a_split_may_have_to_be_wanted_for_some_ticks() -> None:
    best = wanted(policy().propose(view(seen((2, 6), rate=20.0))), (2, 6))
    assert best != (2, 6)
    patient = policy(ticks=2)
    first, second = (patient.propose(view(seen((2, 6), rate=20.0))) for _ in range(2))
    assert wanted(first, (2, 6)) == (2, 6) and "not wanted for long enough" in first.detail
    assert wanted(second, (2, 6)) == best
    # in a row: a tick that wants nothing begins it anew
    broken = policy(ticks=2)
    rates = (20.0, 0.1, 20.0, 20.0)
    seens = [seen((2, 6), rate=rate, tokens_rate=100 * rate) for rate in rates]
    asked = [wanted(broken.propose(view(one)), (2, 6)) for one in seens]
    assert asked == [(2, 6), (2, 6), (2, 6), best]
    # what is not there can't stay, whatever was wanted before
    assert wanted(policy(ticks=9).propose(view(seen((3, 4), rate=20.0))), (3, 4)).total == 8


def test_a_light_load_leaves_the_split_alone() -> None:
    snapshot = seen((1, 7), rate=0.1, tokens_rate=10.0)
    stays = policy().propose(view(snapshot))
    assert wanted(stays, (1, 7)) == (1, 7) and "of what 1A7F can carry" in stays.detail
    assert wanted(policy(least_load=0.0).propose(view(snapshot)), (1, 7)) != (1, 7)


def test_a_budget_that_is_not_there_yet_is_asked_for() -> None:
    # one was lost; the split that remains is no choice
    proposal = policy().propose(view(seen((3, 4), rate=0.1, tokens_rate=10.0)))
    assert wanted(proposal, (3, 4)).total == 8


def test_targets_that_nobody_holds_leave_the_least_bad() -> None:
    slow = replace(MODEL, latencies=TIMES.scaled(attention=40.0, ffn=40.0))
    proposal = policy().propose(view(seen((1, 7), rate=20.0), model=slow))
    assert "above target" in proposal.detail
    got = wanted(proposal, (1, 7))
    assert predict_step(slow, SYSTEM, *got, 40) == pytest.approx(
        min(predict_step(slow, SYSTEM, *split, 40) for split in SPLITS)
    )


def test_prompts_that_take_too_long_want_ffn_workers() -> None:
    # with few FFN workers a prompt alone takes longer than the target of the first token
    prompts = replace(MODEL, prompt_mean=3000.0, theta=100.0)
    targets = SLO(ttft=2.5, tpot=10.0)
    fixed = View(seen((6, 2), 100.0, rate=1.0), targets, EIGHT, SYSTEM, prompts)
    got = wanted(policy(least_load=0.0).propose(fixed), (6, 2))
    alone = 3000 * (2.4e-3 / got.ffn + 6e-5 + 1e-5)
    assert got.ffn > 2 and alone < 2.5 * 0.85


def test_nobody_loses_a_slot_that_is_in_use() -> None:
    # by load alone more FFN workers would do
    snapshot = seen((4, 4), 20.0, rate=30.0, running=240)
    got = wanted(policy().propose(view(snapshot)), (4, 4))
    assert got.attention >= 4
    room = System(64, kv_tokens=2000)
    tight = seen((4, 4), 190.0, running=40)  # ten of them fit on one worker
    assert wanted(policy().propose(view(tight, system=room)), (4, 4)).attention >= 4


# -- no fixed budget -----------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.5, 1.0, 2.0, 3.0])
def test_the_cheapest_numbers_that_hold_are_wanted(rate: float) -> None:
    snapshot = seen((8, 8), rate=rate, running=10)
    got = wanted(policy(gain=0.0, stabilization=0).propose(view(snapshot, FREE)), (8, 8))
    running, tpot = predict_load(MODEL, SYSTEM, *got, rate)
    assert tpot <= TARGETS.tpot and running <= SYSTEM.slots * got.attention
    for a in range(1, 9):
        for f in range(1, 9):
            if a + f < got.total:
                reserve = math.sqrt(rate * 100 / (0.85 * TARGETS.tpot))
                assert carried(Counts(a, f), 200.0) < (rate * 100 + reserve) * 1.05


def test_prices_move_the_choice() -> None:
    snapshot = seen((8, 8), rate=2.0, running=10)
    dear_ffn = replace(FREE, weight_ffn=5.0)
    dear_attention = replace(FREE, weight_attention=5.0)
    few_ffn = wanted(at_once().propose(view(snapshot, dear_ffn)), (8, 8))
    few_attention = wanted(at_once().propose(view(snapshot, dear_attention)), (8, 8))
    assert few_ffn.ffn < few_attention.ffn and few_ffn.attention > few_attention.attention


def test_more_and_fewer_have_their_reasons() -> None:
    more = policy().propose(view(seen((1, 1), rate=2.0), FREE))
    assert more.reason is Reason.SLO_MISSED and wanted(more, (1, 1)).total > 2
    queue = policy().propose(view(seen((1, 1), rate=2.0, waiting=20), FREE))
    assert queue.reason is Reason.QUEUE
    fewer = at_once().propose(view(seen((8, 8), rate=1.0, running=5), FREE))
    assert fewer.reason is Reason.SLO_SLACK and wanted(fewer, (8, 8)).total < 16


def test_a_queue_is_load_as_well() -> None:
    none = wanted(policy().propose(view(seen((2, 2), rate=1.0), FREE)), (2, 2))
    long = wanted(policy().propose(view(seen((2, 2), rate=1.0, waiting=60), FREE)), (2, 2))
    assert long.total > none.total


def test_what_holds_is_kept() -> None:
    first = policy().propose(view(seen((1, 1), rate=2.0), FREE))
    there = wanted(first, (1, 1))
    running, _ = predict_load(MODEL, SYSTEM, *there, 2.0)
    settled = seen(tuple(there), rate=2.0, running=round(running), tokens_rate=200.0)
    again = policy().propose(view(settled, FREE))
    assert wanted(again, there) == there and again.reason is Reason.AS_IT_IS
    # nor is anything given back for a load that is a little lower
    lower = replace(settled, arrival_rate=1.95, tokens_rate=195.0)
    assert wanted(at_once().propose(view(lower, FREE)), there) == there


def test_those_who_run_are_not_squeezed() -> None:
    # few come now, but many run
    many = at_once().propose(view(seen((6, 6), rate=1.0, running=70), FREE))
    few = at_once().propose(view(seen((6, 6), rate=1.0, running=5), FREE))
    assert wanted(many, (6, 6)).total > wanted(few, (6, 6)).total
    kept = wanted(many, (6, 6))
    assert predict_step(MODEL, SYSTEM, *kept, 70) <= TARGETS.tpot


def asked(rate: float, at: float, there: tuple[int, int] = (8, 8)) -> View:
    running = round(4 * rate)
    return view(replace(seen(there, rate=rate, running=running), now=at), FREE)


def test_actors_are_given_back_when_less_was_enough_for_long() -> None:
    one = policy(stabilization=60.0)
    low = wanted(at_once().propose(asked(1.0, 0.0)), (8, 8))
    for at in range(0, 60, 10):
        proposal = one.propose(asked(1.0, float(at)))
        assert proposal.reason is Reason.AS_IT_IS and wanted(proposal, (8, 8)) == (8, 8)
    assert "watched for 50 s only" in proposal.detail
    assert wanted(one.propose(asked(1.0, 60.0)), (8, 8)) == low


def test_the_most_that_was_wanted_for_as_long_is_kept() -> None:
    one = policy(stabilization=60.0)
    low, middle, high = (
        wanted(at_once().propose(asked(rate, 0.0, (1, 1))), (1, 1)) for rate in (1.0, 2.0, 4.0)
    )
    assert low.total < middle.total < high.total
    for at, rate in enumerate((1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 1.0)):
        held = one.propose(asked(rate, 10.0 * at, tuple(high)))
        assert wanted(held, high) == high
    assert f"{high} was wanted 40 s ago" in held.detail
    assert wanted(one.propose(asked(1.0, 70.0, tuple(high))), high) == high
    assert wanted(one.propose(asked(2.0, 81.0, tuple(high))), high) == middle  # 4.0 is forgotten
    assert wanted(one.propose(asked(1.0, 90.0, tuple(high))), high) == middle
    assert wanted(one.propose(asked(1.0, 150.0, tuple(high))), high) == low


def test_more_is_had_at_once_and_a_clock_that_runs_backwards_begins_anew() -> None:
    one = policy(stabilization=60.0)
    assert wanted(one.propose(asked(2.0, 1000.0, (1, 1))), (1, 1)).total > 2
    for at in range(0, 60, 10):
        assert wanted(one.propose(asked(1.0, float(at))), (8, 8)) == (8, 8)
    assert wanted(one.propose(asked(1.0, 60.0)), (8, 8)).total < 16


def test_after_a_time_without_a_model_it_watches_anew() -> None:
    one = policy(stabilization=60.0)
    for at in (0, 30):
        assert wanted(one.propose(asked(1.0, float(at))), (8, 8)) == (8, 8)
    one.propose(replace(asked(1.0, 40.0), model=None))
    for at in (70, 100, 129):
        assert wanted(one.propose(asked(1.0, float(at))), (8, 8)) == (8, 8)
    assert wanted(one.propose(asked(1.0, 130.0)), (8, 8)).total < 16


# -- nothing to go by ----------------------------------------------------------------------------


def test_nothing_is_derived_from_a_model_that_is_not_reliable() -> None:
    for model in (None, replace(MODEL, reliable=False, why="off by 80 %")):
        proposal = policy().propose(view(seen((1, 7), 1500.0, rate=20.0), model=model))
        assert proposal.reason is Reason.MODEL_UNRELIABLE
        assert wanted(proposal, (1, 7)) == (1, 7)
    assert proposal.detail == "off by 80 %"


def test_loads_that_a_table_does_not_cover_change_nothing() -> None:
    table = replace(MODEL, latencies=replace(TIMES, ffn=Tabulated(((1.0, 0.1), (2.0, 0.2)))))
    proposal = policy().propose(view(seen(rate=20.0), model=table))
    assert proposal.reason is Reason.MODEL_UNRELIABLE and wanted(proposal, (4, 4)) == (4, 4)


def test_idle_is_the_least_there_may_be() -> None:
    nobody = seen((5, 3), rate=0.0, running=0, tokens_rate=0.0, batch=0.0, kv_tokens=0.0)
    assert policy().propose(view(nobody)) == Proposal(reason=Reason.IDLE)
    least = policy().propose(view(nobody, FREE))
    assert (least.attention, least.ffn, least.reason) == (1, 1, Reason.IDLE)
    floor = Limits((2, 8), (1, 8), 5, 16, weight_attention=3.0)
    assert wanted(policy().propose(view(nobody, floor)), (5, 3)) == (2, 3)


def test_lengths_that_nobody_knows_change_nothing() -> None:
    unknown = Model(TIMES)
    snapshot = seen(rate=20.0, batch=math.nan, kv_tokens=math.nan)
    proposal = policy().propose(view(snapshot, model=unknown))
    assert wanted(proposal, (4, 4)) == (4, 4) and "nothing is known" in proposal.detail


def test_parameters_are_checked() -> None:
    for bad in (
        {"headroom": 0.0},
        {"gain": -0.1},
        {"stabilization": -1},
        {"form": "naive"},
        {"drain": 0},
        {"more": 1},
    ):
        with pytest.raises(registry.BadPolicy):
            registry.make("optimal_ratio", bad)


# -- always --------------------------------------------------------------------------------------

moments = st.just(math.nan) | st.floats(1, 2000)
models = st.builds(
    Model,
    st.builds(
        Latencies,
        attention=st.builds(Linear, st.floats(1e-6, 1e-4), st.floats(1e-4, 1e-2)),
        ffn=st.builds(Linear, st.floats(1e-4, 1e-2), st.floats(0, 1e-2)),
        transfer=st.builds(Linear, st.floats(0, 1e-4), st.floats(0, 1e-3)),
        prefill=st.builds(Linear, st.floats(0, 1e-4)),
    ),
    theta=moments,
    nu2=moments,
    prompt_mean=moments,
    output_mean=moments,
    lanes=st.integers(1, 2),
    layers=st.integers(1, 30),
    imbalance=st.floats(1, 2),
)


@st.composite
def views(draw: st.DrawFn, fixed: bool | None = None, modelled: bool = False) -> View:
    limits = draw(all_limits(fixed))
    there = draw(counts(limits))
    snapshot = draw(snapshots(there))
    each = draw(st.just(math.nan) | st.floats(1, 64))
    snapshot = replace(snapshot, batch=each, kv_tokens=each * draw(st.floats(1, 3000)))
    system = System(draw(st.integers(1, 64)), draw(st.none() | st.integers(100, 100_000)))
    model = draw(models if modelled else st.none() | models)
    return View(snapshot, TARGETS, limits, system, model)


@settings(max_examples=150, deadline=None)
@given(views(), st.sampled_from(("mean-field", "barrier")))
def test_proposals_are_within_the_limits(given_view: View, form: str) -> None:
    proposal = policy(form=form).propose(given_view)
    assert given_view.limits.allow(wanted(proposal, given_view.there))
    fixed = given_view.limits.fixed
    if fixed is not None:
        assert wanted(proposal, given_view.there).total == fixed
    if given_view.model is None:
        assert proposal.reason is Reason.MODEL_UNRELIABLE


@settings(max_examples=150, deadline=None)
@given(views(fixed=False, modelled=True), st.floats(1.0, 4.0), st.integers(0, 200))
def test_more_load_never_means_fewer(given_view: View, more: float, running: int) -> None:
    assume(given_view.limits.fixed is None)
    s = given_view.snapshot
    assume(s.running or s.waiting or s.arrival_rate > 0)
    heavier = replace(
        s,
        arrival_rate=s.arrival_rate * more,
        tokens_rate=s.tokens_rate * more,
        running=s.running + running,
    )
    there = given_view.there
    less = wanted(policy().propose(given_view), there)
    most = wanted(policy().propose(replace(given_view, snapshot=heavier)), there)
    assert most.total >= less.total


@settings(max_examples=100, deadline=None)
@given(views(fixed=True, modelled=True))
def test_a_split_is_left_only_for_a_gain(given_view: View) -> None:
    judge = policy(gain=0.2, least_load=0.0)
    proposal = judge.propose(given_view)
    there, best = given_view.there, wanted(proposal, given_view.there)
    if best == there or proposal.reason is not Reason.RATIO or "above" in proposal.detail:
        return
    assert judge._table[best] > 1.2 * judge._table.get(there, 0.0)
    # and there it stays
    s = given_view.snapshot
    moved = replace(
        s, attention=best.attention, ffn=best.ffn, attention_preparing=0, ffn_preparing=0
    )
    assert wanted(judge.propose(replace(given_view, snapshot=moved)), best) == best


@settings(max_examples=60, deadline=None)
@given(views())
def test_the_same_view_has_the_same_answer(given_view: View) -> None:
    judge = policy()
    assert judge.propose(given_view) == judge.propose(given_view) == policy().propose(given_view)
