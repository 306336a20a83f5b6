"""Feedback from the targets: what it asks for, what it credits, and what it never does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler import registry
from autoscaler.core import Core, Timing
from autoscaler.limits import Counts, Limits
from autoscaler.model import Model
from autoscaler.policy import Policy, Proposal
from autoscaler.reasons import Reason
from planner.control import Snapshot
from planner.digest import Percentiles
from planner.latency import Latencies, Linear
from tests.autoscaler.views import (
    SYSTEM,
    TARGETS,
    all_limits,
    counts,
    latency,
    snapshot,
    snapshots,
    view,
)

EIGHT = Limits(min_total=8, max_total=8)
FOUR = Counts(4, 4)
WIDE = Limits((1, 16), (1, 16), max_step=16)
MODEL = Model(
    Latencies(Linear(1e-6, 0.001), Linear(1e-4, 0.001), Linear(1e-6, 0.0005)),
    theta=200.0,
    prompt_mean=100.0,
    output_mean=100.0,
)


def policy(**parameters: Any) -> Policy:
    return registry.make("slo_feedback", {"high": 0.9, "low": 0.7, **parameters})


def settled(seen: Snapshot, limits: Limits | None = None, **given: Any) -> Proposal:
    """What it says of a snapshot that has been the same for long."""
    judge = given.pop("judge", None) or policy()
    for _ in range(9):
        judge.propose(view(seen, limits, **given))
    return judge.propose(view(seen, limits, **given))


def wanted(proposal: Proposal, there: Counts = FOUR) -> Counts:
    attention = there.attention if proposal.attention is None else proposal.attention
    return Counts(attention, there.ffn if proposal.ffn is None else proposal.ffn)


# -- more ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "result", "reason"),
    [
        # the busier side gets it
        ({"tpot": 0.1, "ffn_busy": 0.8}, (4, 5), Reason.SLO_MISSED),
        ({"tpot": 0.1, "attention_busy": 0.8}, (5, 4), Reason.SLO_MISSED),
        # as much as is missing, up to half more at once
        ({"tpot": 0.12, "ffn_busy": 0.8}, (4, 6), Reason.SLO_MISSED),
        ({"tpot": 5.0, "ffn_busy": 0.8}, (4, 6), Reason.SLO_MISSED),
        # in balance: where one more does more good
        ({"tpot": 0.1, "ffn": 2}, (4, 3), Reason.SLO_MISSED),
        # first tokens and queues are attention's, unless the experts are what is slow
        ({"ttft": 2.0}, (5, 4), Reason.SLO_MISSED),
        ({"ttft": 2.0, "attention_busy": math.nan}, (5, 4), Reason.SLO_MISSED),
        ({"ttft": 2.0, "ffn_busy": 0.8}, (4, 5), Reason.SLO_MISSED),
        ({"ttft": 2.0, "ffn_busy": 0.8, "running": 250}, (5, 4), Reason.SLO_MISSED),
        ({"waiting": 11}, (5, 4), Reason.QUEUE),
        ({"waiting": 11, "ffn_busy": 0.8}, (4, 5), Reason.QUEUE),
        # room for contexts is only there
        ({"kv_usage": 0.9, "ffn_busy": 0.8}, (5, 4), Reason.QUEUE),
        ({"rejected": 1, "ffn_busy": 0.8}, (5, 4), Reason.QUEUE),
        # two troubles, two sides
        ({"tpot": 0.1, "kv_usage": 0.9, "ffn_busy": 0.8}, (5, 5), Reason.SLO_MISSED),
        # all of a side is gone
        ({"ttft": 9.0, "attention": 0}, (1, 4), Reason.SLO_MISSED),
    ],
)
def test_who_gets_more(change: dict[str, Any], result: tuple[int, int], reason: Reason):
    seen = snapshot(**change)
    proposal = settled(seen, WIDE)
    assert wanted(proposal, Counts(seen.attention, seen.ffn)) == Counts(*result)
    assert proposal.reason is reason


@pytest.mark.parametrize("ticks", [1, 2, 5])
def test_trouble_has_to_last(ticks: int):
    judge = policy(up_ticks=ticks)
    missed = view(snapshot(ttft=3.0), WIDE)
    answers = [judge.propose(missed) for _ in range(ticks + 1)]
    assert [wanted(answer).attention > 4 for answer in answers] == [False] * (ticks - 1) + [
        True
    ] * 2
    assert judge.propose(view(snapshot())).attention is None
    assert (wanted(judge.propose(missed)).attention > 4) == (ticks == 1)


def test_what_is_being_started_is_credited():
    judge = policy()
    seen = snapshot(ttft=2.0, attention=4, attention_preparing=1)
    assert wanted(settled(seen, WIDE, judge=judge), Counts(5, 4)) == Counts(5, 4)
    worse = replace(seen, ttft=latency(3.0))
    assert wanted(settled(worse, WIDE, judge=judge), Counts(5, 4)) == Counts(6, 4)


def test_other_numbers_of_workers_start_it_anew():
    judge = policy(up_ticks=3)
    for attention in (4, 5, 4, 5):
        proposal = judge.propose(view(snapshot(ttft=3.0, attention=attention), WIDE))
        assert proposal.attention is None


# -- less ----------------------------------------------------------------------------------------

LIGHT = {"ttft": 0.2, "tpot": 0.02, "running": 10, "kv_usage": 0.05}


@pytest.mark.parametrize(
    ("change", "limits", "result"),
    [
        ({"ffn_busy": 0.2}, Limits(), (4, 3)),
        ({"attention_busy": 0.2}, Limits(), (3, 4)),
        # the heavier one first
        ({"attention_busy": 0.4}, Limits(weight_ffn=4.0), (4, 3)),
        # not below the bounds, and not below the budget
        ({"ffn_busy": 0.2}, Limits(ffn=(4, 8)), (3, 4)),
        ({"ffn_busy": 0.2}, Limits(attention=(4, 8), ffn=(4, 8)), (4, 4)),
        ({"ffn_busy": 0.2}, Limits(min_total=8), (4, 4)),
        # what would not hold with one less: 0.56 * 4/3 > 0.7
        ({"ttft": 1.12}, Limits(), (4, 4)),
        ({"tpot": 0.056}, Limits(), (4, 4)),
        ({"waiting": 7}, Limits(), (4, 4)),
        # contexts and slots need attention workers, and only them
        ({"attention_busy": 0.2, "kv_usage": 0.5}, Limits(), (4, 3)),
        ({"attention_busy": 0.2, "running": 150}, Limits(), (4, 3)),
        # not while others are being started, and not in the dark
        ({"attention_preparing": 1}, Limits(), (5, 4)),
        ({"tpot": math.nan}, Limits(), (4, 3)),
    ],
)
def test_who_goes(change: dict[str, Any], limits: Limits, result: tuple[int, int]):
    seen = snapshot(**{**LIGHT, **change})
    there = view(seen).there
    proposal = settled(seen, limits)
    if math.isnan(change.get("tpot", 0.0)):
        seen = replace(seen, tpot=Percentiles(), itl=Percentiles())
        proposal, result = settled(seen, limits), tuple(there)
    assert wanted(proposal, there) == Counts(*result)
    if there != Counts(*result):
        assert proposal.reason is Reason.SLO_SLACK


def test_slack_has_to_last():
    judge = policy(down_ticks=5)
    slack, busy = view(snapshot(**LIGHT)), view(snapshot(ttft=1.4))
    sizes = [wanted(judge.propose(slack)).total for _ in range(5)]
    assert sizes == [8, 8, 8, 8, 7]
    judge.propose(busy)
    assert wanted(judge.propose(slack)).total == 8


def test_an_idle_system_rests_at_the_bounds():
    nothing = Snapshot(now=0.0, window=20.0, attention=4, ffn=4)
    proposal = settled(nothing, Limits(attention=(2, 8), min_total=4))
    assert (wanted(proposal), proposal.reason) == (Counts(3, 1), Reason.IDLE)
    assert wanted(settled(nothing, EIGHT)) == Counts(4, 4)


def test_a_model_that_is_trusted_looks_ahead_better_than_proportion():
    # Most of a step does not depend on the number of workers; proportion takes it to.
    seen = snapshot(ttft=0.2, tpot=0.06, running=10, arrival_rate=2.0, kv_usage=0.05)
    assert wanted(settled(seen)) == Counts(4, 4)
    assert wanted(settled(seen, model=MODEL)).total == 7
    assert wanted(settled(seen, model=replace(MODEL, reliable=False, why="far off"))).total == 8
    # At 400 a second three workers can't follow, however good it looks at the moment.
    assert wanted(settled(replace(seen, arrival_rate=400.0), model=MODEL)).total == 8


def test_what_arrives_now_shows_in_latencies_only_later():
    surge = snapshot(**LIGHT, arrival_rate=150.0)
    assert wanted(settled(surge)).total == 7
    assert wanted(settled(surge, model=replace(MODEL, output_mean=200.0))).total == 8


# -- a fixed budget ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "result"),
    [
        # to the busier side, as far as balance needs, two at most
        ({"tpot": 0.2, "attention_busy": 0.9, "ffn_busy": 0.3}, (6, 2)),
        ({"tpot": 0.2, "attention_busy": 0.7, "ffn_busy": 0.4}, (5, 3)),
        ({"tpot": 0.2, "attention_busy": 0.3, "ffn_busy": 0.9}, (2, 6)),
        ({"ttft": 5.0, "attention_busy": 0.9, "ffn_busy": 0.3}, (6, 2)),
        # not within the margin, not where it gains little, not without knowing who is busy
        ({"tpot": 0.2, "attention_busy": 0.5, "ffn_busy": 0.4}, (4, 4)),
        ({"tpot": 0.2, "attention_busy": 0.8, "ffn_busy": 0.6}, (4, 4)),
        ({"tpot": 0.2, "attention_busy": math.nan, "ffn_busy": 0.9}, (4, 4)),
        # not while the targets are held, however lopsided
        ({"tpot": 0.05, "attention_busy": 0.9, "ffn_busy": 0.1}, (4, 4)),
        # not while something is being started
        (
            {"tpot": 0.2, "attention_busy": 0.9, "ffn_busy": 0.3, "ffn": 3, "ffn_preparing": 1},
            (4, 4),
        ),
        # room for contexts, where TPOT can afford it
        ({"tpot": 0.04, "kv_usage": 0.95}, (5, 3)),
        ({"tpot": 0.06, "kv_usage": 0.95}, (4, 4)),
    ],
)
def test_a_fixed_budget_shifts(change: dict[str, Any], result: tuple[int, int]):
    proposal = settled(snapshot(**change), EIGHT)
    assert wanted(proposal) == Counts(*result)
    if result != (4, 4):
        assert proposal.reason is Reason.RATIO


def test_a_full_budget_shifts_too():
    seen = snapshot(tpot=0.2, attention_busy=0.9, ffn_busy=0.3)
    assert wanted(settled(seen, Limits(max_total=8))) == Counts(6, 2)


def test_a_side_that_is_full_is_helped_before_targets_are_missed():
    full = {"attention_busy": 0.97, "ffn_busy": 0.4}
    assert wanted(settled(snapshot(tpot=0.08, **full), EIGHT)) == Counts(5, 3)
    # a light load keeps the side that steps alone busy too
    assert wanted(settled(snapshot(tpot=0.05, **full), EIGHT)) == Counts(4, 4)
    assert wanted(settled(snapshot(tpot=0.08, attention_busy=0.97, ffn_busy=0.8), EIGHT)) == FOUR


def test_what_piles_up_is_work_of_the_busier_side():
    """1.0 busy says nothing of how much more would be needed: what is asked over what is done."""
    busy = {"tpot": 0.3, "attention": 6, "ffn": 2, "attention_busy": 0.2, "ffn_busy": 1.0}
    keeps_up = snapshot(**busy, arrival_rate=10.0, output_mean=40.0, tokens_rate=400.0)
    behind = replace(keeps_up, tokens_rate=200.0)
    limits = replace(EIGHT, max_step=4)
    found = [
        wanted(settled(seen, limits, judge=policy(shift=4)), Counts(6, 2))
        for seen in (keeps_up, behind)
    ]
    assert found == [Counts(3, 5), Counts(2, 6)]


def test_the_next_shift_waits_for_what_the_last_one_does():
    """Requests from before it are slow whatever is done now: half of them have to be answered."""
    judge = policy()
    first = snapshot(tpot=0.3, attention_busy=0.9, ffn_busy=0.3, running=40, waiting=0)
    assert wanted(settled(first, EIGHT, judge=judge)) == Counts(6, 2)
    shifted = replace(first, attention=6, ffn=2, attention_busy=0.3, ffn_busy=0.95)
    asked = []
    for tick in range(12):
        seen = replace(shifted, now=shifted.now + 1.0 + tick, window=5.0, completed=20)
        asked.append(wanted(judge.propose(view(seen, EIGHT)), Counts(6, 2)))
    assert asked[:6] == [Counts(6, 2)] * 6  # 20 of 40 are answered after five seconds
    assert asked[-1] == Counts(4, 4)


def test_the_next_shift_does_not_wait_for_ever():
    """Three windows, where nothing is answered at all."""
    judge = policy()
    first = snapshot(tpot=0.3, attention_busy=0.9, ffn_busy=0.3, running=40)
    settled(first, EIGHT, judge=judge)
    stuck = replace(
        first, attention=6, ffn=2, attention_busy=0.3, ffn_busy=0.95, completed=0, window=5.0
    )
    asked = []
    for tick in range(20):
        seen = replace(stuck, now=stuck.now + 1.0 + tick)
        asked.append(wanted(judge.propose(view(seen, EIGHT)), Counts(6, 2)))
    assert asked[13] == Counts(6, 2) and asked[-1] == Counts(4, 4)


@settings(max_examples=40)
@given(st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 7))
def test_shifts_end_at_balance_and_never_come_back(a_busy: float, f_busy: float, attention: int):
    """Work that stays the same is shifted in one direction, and then no more."""
    work = a_busy * attention, f_busy * (8 - attention)
    split, seen = attention, []
    for _ in range(8):
        at = snapshot(
            tpot=0.5,
            attention=split,
            ffn=8 - split,
            attention_busy=min(1.0, work[0] / split),
            ffn_busy=min(1.0, work[1] / (8 - split)),
        )
        proposal = settled(at, EIGHT)
        now = wanted(proposal, Counts(split, 8 - split)).attention
        seen.append(now - split)
        split = now
    moves = [move for move in seen if move]
    assert all(move > 0 for move in moves) or all(move < 0 for move in moves)
    assert seen[-1] == 0


# -- promises ------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(all_limits(), st.data())
def test_it_proposes_whole_numbers_whatever_it_is_shown(limits: Limits, data: st.DataObject):
    judge = policy()
    there = data.draw(counts(limits))
    for _ in range(4):
        seen = data.draw(snapshots(there))
        proposal = judge.propose(
            view(seen, limits, model=data.draw(st.sampled_from([None, MODEL])))
        )
        for number in (proposal.attention, proposal.ffn):
            assert number is None or (type(number) is int and number >= 1)
        # A fixed budget keeps its sum; nothing shrinks below the bounds.
        at = wanted(proposal, there)
        if limits.fixed is not None:
            assert at.total == there.total
        assert at.attention >= limits.attention[0]
        assert at.ffn >= limits.ffn[0]


@settings(max_examples=60)
@given(all_limits(), st.data())
def test_higher_saturation_never_asks_for_fewer(limits: Limits, data: st.DataObject):
    there = data.draw(counts(limits))
    calm = replace(data.draw(snapshots(there)), itl=latency(0.05))
    more = {
        "ttft": latency(data.draw(st.floats(0.0, 4.0)) + _p90(calm.ttft), 100),
        "tpot": latency(data.draw(st.floats(0.0, 0.2)) + _p90(calm.tpot), 100),
    }
    calm = replace(calm, ttft=latency(_p90(calm.ttft)), tpot=latency(_p90(calm.tpot)))
    worse = replace(
        calm,
        **more,
        waiting=calm.waiting + data.draw(st.integers(0, 20)),
        rejected=calm.rejected + data.draw(st.integers(0, 2)),
    )
    asked = [wanted(settled(seen, limits), there).total for seen in (calm, worse)]
    assert asked[0] <= asked[1]


def _p90(percentiles: Percentiles) -> float:
    return percentiles.p90 if percentiles.count else 0.0


def test_a_closed_loop_settles():
    """Latencies that follow load over workers: it finds a size, and stays there."""
    limits = Limits((1, 16), (1, 16))
    judge = Core(policy(), limits, TARGETS, SYSTEM, Timing())
    there, sizes, changes = Counts(2, 2), [], []
    for tick in range(600):
        load = 6.0 if tick < 300 else 3.0
        slow = load / there.attention, load / there.ffn
        seen = snapshot(
            now=2.0 * tick,
            ttft=1.0 * slow[0],
            tpot=0.04 * slow[1] + 0.01 * slow[0],
            attention=there.attention,
            ffn=there.ffn,
            attention_busy=min(1.0, 0.5 * slow[0]),
            ffn_busy=min(1.0, 0.5 * slow[1]),
        )
        decision = judge.tick(seen)
        if decision.target is not None:
            there = decision.target
            changes.append(tick)
        sizes.append(there)
    settled_at = [size for tick, size in enumerate(sizes) if 150 < tick < 300 or tick > 500]
    assert len(set(settled_at)) == 2
    assert sizes[299].total > sizes[-1].total > 2
    assert len(changes) < 15
