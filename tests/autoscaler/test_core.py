"""The controller's core: what it never does, whatever policy and telemetry say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.core import KV_FULL, Core, Situation, Timing
from autoscaler.limits import Counts, Limits
from autoscaler.policy import Decision, Parameters, Proposal, View
from autoscaler.reasons import Reason
from planner.control import Snapshot
from tests.autoscaler.views import (
    NONSENSE,
    PROPOSALS,
    SYSTEM,
    TARGETS,
    all_limits,
    counts,
    latency,
    snapshot,
    snapshots,
)

TIMING = Timing(interval=2.0, cooldown=10.0, shrink_cooldown=60.0, stale=10.0, least_window=2.0)


class Scripted:
    """Answers what it is told to, and counts how often it was asked."""

    name = "scripted"
    Parameters = Parameters

    def __init__(self, answer: Any = None):
        self.answer = answer
        self.asked = 0

    def propose(self, view: View) -> Any:
        self.asked += 1
        return self.answer(view) if callable(self.answer) else self.answer


def core(answer: Any = None, limits: Limits | None = None, **given: Any) -> Core:
    return Core(Scripted(answer), limits or Limits(), TARGETS, SYSTEM, TIMING, **given)


def raising(error: BaseException) -> Callable[[View], Any]:
    def answer(view: View) -> Any:
        raise error

    return answer


# -- one tick ------------------------------------------------------------------------------------


@given(all_limits(), st.data())
def test_one_tick_keeps_every_promise(limits: Limits, data: st.DataObject):
    there = data.draw(counts(limits))
    seen = data.draw(snapshots(there))
    held = data.draw(st.dictionaries(st.sampled_from(["attention", "ffn"]), st.just("no place")))
    decision = core(data.draw(PROPOSALS | st.none()), limits).tick(
        seen, situation=Situation(cannot_place=held)
    )
    check(decision, limits, seen)
    assert decision.reasons
    if decision.target is not None:
        for role in held:
            assert getattr(decision.target, role) <= getattr(there, role)


@given(NONSENSE)
def test_nonsense_is_refused_and_the_target_held(answer: object):
    decision = core(answer).tick(snapshot())
    assert decision.reasons == (Reason.POLICY_NONSENSE,)
    assert (decision.target, decision.proposed) == (None, None)
    assert "scripted" in decision.detail


@pytest.mark.parametrize("error", [ValueError("no"), ZeroDivisionError(), RecursionError("deep")])
def test_a_policy_that_raises_is_held(error: Exception):
    decision = core(raising(error)).tick(snapshot())
    assert decision.reasons == (Reason.POLICY_FAILED,)
    assert decision.target is None
    assert type(error).__name__ in decision.detail


def test_huge_numbers_are_capped():
    decision = core(Proposal(10**400, 10**400)).tick(snapshot())
    assert decision.target == Counts(6, 6)
    assert set(decision.reasons) >= {Reason.AT_BOUND, Reason.STEP_CAPPED}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"age": 11.0}, Reason.STALE_DATA),
        ({"age": math.inf}, Reason.STALE_DATA),
        ({"age": math.nan}, Reason.STALE_DATA),
        ({"window": 1.0}, Reason.NO_DATA),
        ({"window": math.nan}, Reason.NO_DATA),
        ({"tokens_rate": 0.0, "ttft": latency(math.nan, 0)}, Reason.NO_DATA),
    ],
)
def test_stale_or_insufficient_data_decides_nothing(change: dict[str, Any], reason: Reason):
    judge = core(Proposal(5, 5))
    decision = judge.tick(replace(snapshot(), **change))
    assert decision.reasons == (reason,)
    assert decision.target is None
    assert judge.policy.asked == 0  # type: ignore[attr-defined]


def test_refused_requests_are_data_though_no_token_came():
    seen = snapshot(tokens_rate=0.0, ttft=latency(math.nan, 0), rejected=4)
    assert core(Proposal(5)).tick(seen).target == Counts(5, 4)


def test_empty_telemetry_changes_nothing_by_itself():
    assert core().tick(Snapshot(now=0.0, window=20.0, attention=4, ffn=4)).target is None


@given(st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_all_workers_may_be_gone(attention: int, ffn: int, placed: bool):
    held = {} if placed else {"attention": "no place", "ffn": "no place"}
    seen = snapshot(attention=attention, ffn=ffn)
    decision = core().tick(seen, situation=Situation(cannot_place=held))
    assert (decision.target is not None) == (placed and min(attention, ffn) == 0)


@pytest.mark.parametrize("now", [100.0, 99.0, 0.0, 1e6, math.nan])
def test_a_clock_that_jumps_decides_nothing_once(now: float):
    judge = core(Proposal(5, 5))
    judge.paused = True
    judge.tick(snapshot(now=100.0))
    judge.paused = False
    jumped = judge.tick(snapshot(now=now))
    assert (jumped.reasons, jumped.target) == ((Reason.CLOCK_JUMPED,), None)
    if math.isfinite(now):
        assert judge.tick(snapshot(now=now + 2)).target == Counts(5, 5)


def test_a_clock_that_ran_back_does_not_hold_for_ever():
    judge = core(Proposal(5, 5))
    assert judge.tick(snapshot(now=1e6)).target
    times = [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    targets = [judge.tick(snapshot(now=now)).target for now in times]
    assert targets == [None] * 5 + [Counts(5, 5), None]


@pytest.mark.parametrize(
    ("given", "situation", "reason"),
    [
        ({"mode": "advise"}, Situation(), Reason.ADVISORY),
        ({}, Situation(changing="change 3"), Reason.CHANGING),
    ],
)
def test_it_says_what_it_would_do(given: dict[str, Any], situation: Situation, reason: Reason):
    decision = core(Proposal(5, 4, Reason.QUEUE), **given).tick(snapshot(), situation=situation)
    assert decision.target is None
    assert decision.advised == Counts(5, 4)
    assert decision.reasons == (reason, Reason.QUEUE)


def test_paused_and_resumed():
    judge = core(Proposal(5, 4))
    judge.paused = True
    assert judge.tick(snapshot(now=100.0)).reasons[0] is Reason.PAUSED
    judge.paused = False
    assert judge.tick(snapshot(now=102.0)).target == Counts(5, 4)


def test_a_role_without_place_is_held_and_the_other_adjusted():
    decision = core(Proposal(5, 6)).tick(
        snapshot(), situation=Situation(cannot_place={"ffn": "no node has a free GPU"})
    )
    assert decision.target == Counts(5, 4)
    assert Reason.CANNOT_PLACE in decision.reasons
    assert "no node has a free GPU" in decision.detail


@given(st.integers(0, 300), st.floats(0.0, 1.0), st.integers(1, 4))
def test_attention_never_shrinks_below_what_runs(running: int, kv_usage: float, wanted: int):
    seen = snapshot(running=running, kv_usage=kv_usage)
    decision = core(Proposal(wanted)).tick(seen)
    check(decision, Limits(), seen)
    if decision.target is None and wanted < 4:
        assert Reason.CONSOLIDATION in decision.reasons


def test_what_runs_is_kept_even_when_the_limits_shrink():
    # 200 requests at 64 slots take 4 workers, whatever somebody has put into the spec since.
    decision = core(None, Limits(attention=(1, 2))).tick(snapshot(running=200))
    assert decision.target is None


# -- cool-downs ----------------------------------------------------------------------------------


def play(judge: Core, script: list[tuple[float, Counts, Proposal]]) -> list[Counts | None]:
    targets = []
    for now, there, answer in script:
        judge.policy.answer = answer  # type: ignore[attr-defined]
        seen = snapshot(now=now, attention=there.attention, ffn=there.ffn, running=1)
        targets.append(judge.tick(seen).target)
    return targets


FOUR, MORE = Counts(4, 4), Counts(5, 4)


def test_no_change_of_mind_within_a_cooldown():
    script = [(t, FOUR if t == 0 else MORE, Proposal(5 if t == 0 else 4)) for t in range(0, 70, 5)]
    targets = play(core(), script)
    assert targets == [MORE, *[None] * 11, FOUR, None]


def test_growing_again_waits_for_the_short_cooldown_only():
    script = [(t, FOUR if t == 0 else MORE, Proposal(5 if t == 0 else 6)) for t in range(0, 20, 5)]
    assert play(core(), script) == [MORE, None, Counts(6, 4), None]


def test_the_shrinking_leg_of_a_shift_does_not_go_alone():
    # Attention shrank; 15 s later it may not grow back, so FFN may not shrink for it either.
    shift = Proposal(4, 3)
    script = [(0.0, FOUR, Proposal(3, 4)), *[(t, Counts(3, 4), shift) for t in (5.0, 15.0, 25.0)]]
    assert play(core(), script) == [Counts(3, 4), None, None, None]


def test_a_refused_target_counts_for_nothing_and_what_was_before_counts_again():
    judge = core(Proposal(5, 4))
    judge.tick(snapshot(now=0.0))
    judge.policy.answer = Proposal(6, 4)  # type: ignore[attr-defined]
    refused = judge.tick(snapshot(now=12.0, attention=5))
    judge.undone(refused)
    again = judge.tick(snapshot(now=14.0, attention=5))
    assert again.target == refused.target == Counts(6, 4)
    judge.undone(again)
    judge.policy.answer = Proposal(4, 4)  # type: ignore[attr-defined]
    # 16 s after the change that did happen: too early to take it back.
    assert judge.tick(snapshot(now=16.0, attention=5)).reasons[0] is Reason.COOLDOWN


def test_an_old_refusal_does_not_undo_a_newer_decision():
    judge = core(Proposal(5, 4))
    old = judge.tick(snapshot(now=0.0))
    judge.policy.answer = Proposal(6, 4)  # type: ignore[attr-defined]
    judge.tick(snapshot(now=12.0, attention=5))
    judge.undone(old)
    judge.policy.answer = Proposal(7, 4)  # type: ignore[attr-defined]
    assert judge.tick(snapshot(now=14.0, attention=6)).reasons[0] is Reason.COOLDOWN


def test_experts_are_placed_anew_once_per_cooldown_and_not_beside_a_change():
    judge = core()
    wish = Situation(rebalance_gain=0.2)
    times = [float(t) for t in range(0, 66, 2)]
    asked = [judge.tick(snapshot(now=t), situation=wish).rebalance for t in times]
    assert [t for t, yes in zip(times, asked, strict=True) if yes] == [0.0, 60.0]
    assert not core(Proposal(5)).tick(snapshot(), situation=wish).rebalance
    assert not core(rebalance_over=None).tick(snapshot(), situation=wish).rebalance
    assert not core(mode="advise").tick(snapshot(), situation=wish).rebalance


# -- many ticks ----------------------------------------------------------------------------------


@dataclass
class World:
    """A deployment that carries out targets at once, late, never, or says no."""

    there: Counts
    due: int = 0
    target: Counts | None = None
    order: Decision | None = None
    kept: list[Decision] = field(default_factory=list)

    def step(self, judge: Core) -> None:
        if self.target is None:
            return
        self.due -= 1
        if self.due < 0:
            self.there, self.target = self.target, None

    def take(self, judge: Core, decision: Decision, fate: str) -> None:
        if decision.target is None:
            return
        if fate == "refused":
            judge.undone(decision)
            return
        self.kept.append(decision)
        if fate == "late":
            self.target, self.due = decision.target, 4
        elif fate == "at once":
            self.there = decision.target
        # "lost": nobody ever hears of it

    @property
    def situation(self) -> Situation:
        return Situation(changing="a change" if self.target is not None else "")


FATES = st.sampled_from(["at once", "late", "lost", "refused"])


@settings(max_examples=60)
@given(all_limits(), st.data())
def test_many_ticks_in_a_world_that_is_late_or_refuses(limits: Limits, data: st.DataObject):
    """Whatever becomes of targets, no state leaves the limits and no mind changes too early."""
    world = World(data.draw(counts(limits)))
    judge = core(None, limits)
    now = 0.0
    for proposal, fate in data.draw(st.lists(st.tuples(PROPOSALS, FATES), max_size=50)):
        judge.policy.answer = proposal  # type: ignore[attr-defined]
        now += data.draw(st.sampled_from([2.0, 6.0, 18.0]))
        world.step(judge)
        seen = snapshot(
            now=now,
            attention=world.there.attention,
            ffn=world.there.ffn,
            running=data.draw(st.integers(0, 256)),
        )
        decision = judge.tick(seen, situation=world.situation)
        check(decision, limits, seen)
        if decision.target is not None:
            assert world.target is None, "one change at a time"
            check_timing(decision, world.kept)
        world.take(judge, decision, fate)
        assert limits.allow(world.there)


def check(decision: Decision, limits: Limits, seen: Snapshot) -> None:
    """What holds for every decision that starts within the limits."""
    there, target = decision.there, decision.target
    assert limits.allow(decision.advised)
    if target is None:
        return
    assert target != there
    assert limits.allow(target)
    for new, old in zip(target, there, strict=True):
        assert abs(new - old) <= limits.max_step
    if limits.fixed is not None:
        assert target.attention - there.attention == there.ffn - target.ffn != 0
    needed = math.ceil(seen.running / SYSTEM.slots)
    if math.isfinite(seen.kv_usage):
        needed = max(needed, math.ceil(seen.kv_usage * seen.attention / KV_FULL))
    assert target.attention >= min(there.attention, needed)


def check_timing(decision: Decision, kept: list[Decision]) -> None:
    """Cool-downs, counted from the changes that were not refused."""
    target, there = decision.target, decision.there
    assert target is not None
    if not kept:
        return
    assert decision.at - kept[-1].at >= TIMING.cooldown
    grows = any(new > old for new, old in zip(target, there, strict=True))
    if not grows:
        assert decision.at - kept[-1].at >= TIMING.shrink_cooldown
    for before in kept:
        if decision.at - before.at >= TIMING.shrink_cooldown:
            continue
        assert before.target is not None
        for role in range(2):
            did = before.target[role] - before.there[role]
            does = target[role] - there[role]
            assert did * does >= 0, "no change of mind"
