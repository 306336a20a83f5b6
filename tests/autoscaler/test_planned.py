"""The planner's split at run time: asked once per kind of load, never waited for, never forced."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.advice import KEPT, Advice, Adviser, Load, kind, read
from autoscaler.core import Core
from autoscaler.limits import Counts, Limits
from autoscaler.policies.planned import Planned, PlannedParameters
from autoscaler.reasons import Reason
from planner.errors import PlannerError
from planner.explore.points import Mode
from planner.explore.question import Exploration
from tests.autoscaler.views import SYSTEM, TARGETS, all_limits, snapshot, snapshots, view
from tests.planner.explore.explorations import exploration, group, point, refusal

EIGHT = Limits((1, 7), (1, 7), 8, 8)


def afd(attention: int, ffn: int, rate: float = 1000.0, **given: Any) -> Any:
    groups = (group("attention", attention), group("ffn", ffn))
    return point(Mode.AFD, rate, groups=groups, **given)


class Planner:
    """Answers with the same splits and notes what it was asked."""

    def __init__(self, attention: int = 2, ffn: int = 6):
        self.found = exploration({Mode.AFD: afd(attention, ffn)})
        self.asked: list[Load] = []

    def __call__(self, load: Load) -> Exploration:
        self.asked.append(load)
        return self.found


def policy(planner: Any, **given: Any) -> Planned:
    facts = {"model": "a", "system": "b", "ticks": 1, "background": False, **given}
    made = Planned(PlannedParameters(**facts))
    made.adviser = Adviser(planner, made.parameters.background)
    return made


def test_the_planned_split_of_the_budget_is_wanted() -> None:
    planner = Planner()
    proposal = policy(planner).propose(view(limits=EIGHT))
    assert (proposal.attention, proposal.ffn) == (2, 6)
    assert proposal.reason is Reason.RATIO
    assert "4A4F -> 2A6F" in proposal.detail and "2A+6F of 128 GPUs: 1,000" in proposal.detail
    (load,) = planner.asked
    assert load.gpus == 8 and load.prefix == 0
    assert (load.ttft, load.tpot) == pytest.approx((0.85 * 2.0, 0.85 * 0.1))


def test_a_plan_of_fewer_gpus_is_a_ratio() -> None:
    proposal = policy(Planner(16, 112)).propose(view(limits=EIGHT))
    assert (proposal.attention, proposal.ffn) == (1, 7)


def test_cached_prompts_are_a_prefix() -> None:
    planner = Planner()
    seen = snapshot(prompt_mean=1000.0, prefix_hit=0.75)
    policy(planner, grain=0.01).propose(view(seen, EIGHT))
    (load,) = planner.asked
    assert load.prefix == pytest.approx(750, rel=0.01)
    assert load.prompt == pytest.approx(250, rel=0.01)


def test_lengths_of_one_kind_are_asked_about_once() -> None:
    planner = Planner()
    decides = policy(planner)
    for prompt in (90.0, 93.0, 87.0, 100.0):
        decides.propose(view(snapshot(prompt_mean=prompt), EIGHT))
    assert len(planner.asked) == 1
    decides.propose(view(snapshot(prompt_mean=2000.0), EIGHT))
    assert len(planner.asked) == 2


def test_lengths_between_two_kinds_do_not_swing() -> None:
    # 103 is rounded to 116 and 97 to 90
    planner = Planner()
    decides = policy(planner)
    for prompt in (103.0, 97.0, 103.0, 97.0):
        decides.propose(view(snapshot(prompt_mean=prompt), EIGHT))
    assert {load.prompt for load in planner.asked} == {kind(103.0, 0.25)} != {kind(97.0, 0.25)}


def test_no_tick_waits_for_the_planner() -> None:
    answer = threading.Event()
    planner = Planner()

    def slow(load: Load) -> Exploration:
        answer.wait(30)
        return planner(load)

    decides = policy(slow, background=True)
    began = time.monotonic()
    for _ in range(3):
        proposal = decides.propose(view(limits=EIGHT))
        assert (proposal.attention, proposal.ffn) == (None, None)
        assert "is looking at prompts of about" in proposal.detail
    assert time.monotonic() - began < 5
    answer.set()
    decides.adviser.wait(30)
    assert decides.propose(view(limits=EIGHT)).attention == 2
    assert len(planner.asked) == 1


def test_a_split_has_to_be_wanted_for_some_ticks() -> None:
    decides = policy(Planner(), ticks=3)
    proposals = [decides.propose(view(limits=EIGHT)) for _ in range(3)]
    assert [proposal.attention for proposal in proposals] == [None, None, 2]
    assert "not wanted for long enough" in proposals[0].detail


def test_what_is_near_enough_stays() -> None:
    near = snapshot(attention=3, ffn=5)
    assert policy(Planner(), tolerance=0.15).propose(view(near, EIGHT)).attention is None
    assert policy(Planner(), tolerance=0.1).propose(view(near, EIGHT)).attention == 2


def test_a_better_level_is_said_and_the_split_still_planned() -> None:
    planner = Planner()
    best = {Mode.AGGREGATED: point(Mode.AGGREGATED, 1300.0), Mode.AFD: afd(2, 6)}
    planner.found = exploration(best)
    proposal = policy(planner).propose(view(limits=EIGHT))
    assert proposal.attention == 2
    assert "aggregation would serve 1.3x here" in proposal.detail


def test_where_afd_does_not_hold_nothing_moves_and_the_limit_is_said() -> None:
    planner = Planner()
    planner.found = exploration(
        {Mode.AGGREGATED: point(Mode.AGGREGATED, 1300.0), Mode.AFD: refusal()}
    )
    proposal = policy(planner).propose(view(limits=EIGHT))
    assert (proposal.attention, proposal.ffn, proposal.reason) == (None, None, Reason.OTHER)
    assert "ttft: 0.093 at best" in proposal.detail
    assert "aggregation would serve 1,300 tokens/s here" in proposal.detail


def test_tensor_parallelism_is_no_split_of_actors() -> None:
    best = afd(2, 6)
    wide = replace(best, groups=(group("attention", 2, tp=2), group("ffn", 6)), tokens_per_s=2000.0)
    found = exploration({Mode.AFD: wide}, frontier={Mode.AFD: (wide, best)})
    assert "1,000 tokens/s" in read(found).text
    alone = exploration({Mode.AFD: wide}, frontier={Mode.AFD: (wide,)})
    assert math.isnan(read(alone).attention_share)
    assert "tensor parallelism" in read(alone).text


@pytest.mark.parametrize("error", [PlannerError("no such system"), RuntimeError("out of luck")])
def test_a_planner_that_fails_is_asked_once_and_explained(error: Exception) -> None:
    asked = []

    def fails(load: Load) -> Exploration:
        asked.append(load)
        raise error

    decides = policy(fails)
    for _ in range(3):
        proposal = decides.propose(view(limits=EIGHT))
    assert len(asked) == 1
    assert proposal.reason is Reason.MODEL_UNRELIABLE
    assert str(error) in proposal.detail


def test_without_model_or_system_or_lengths_nothing_is_asked() -> None:
    planner = Planner()
    assert "model and system" in policy(planner, model="").propose(view()).detail
    unknown = snapshot(prompt_mean=math.nan, output_mean=math.nan)
    assert "nothing is known" in policy(planner).propose(view(unknown)).detail
    assert planner.asked == []


def test_the_core_carries_it_out() -> None:
    decision = Core(policy(Planner()), EIGHT, TARGETS, SYSTEM).tick(snapshot())
    assert decision.target == Counts(2, 6)


def test_a_real_search() -> None:
    given = {"model": "Qwen/Qwen3-30B-A3B", "system": "h200_sxm", "kernels": "roofline"}
    decides = Planned(
        PlannedParameters(**given, compare=False, ticks=1, tolerance=0.0, background=False)  # type: ignore[arg-type]
    )
    proposal = decides.propose(view(snapshot(attention=1, ffn=3), Limits((1, 3), (1, 3), 4, 4)))
    assert (proposal.attention, proposal.ffn) in {(2, 2), (3, 1)}  # attention is what takes long
    assert "tokens/s, TTFT" in proposal.detail
    unknown = Planned(PlannedParameters(model="gpt-2", system="h200_sxm", background=False))
    proposal = unknown.propose(view(limits=EIGHT))
    assert proposal.reason is Reason.MODEL_UNRELIABLE and "unknown model" in proposal.detail


def test_old_answers_are_forgotten() -> None:
    planner = Planner()
    adviser = Adviser(planner, background=False)
    loads = [Load(0, 100 + i, 10, 8, 1.0, 0.1) for i in range(KEPT + 1)]
    for load in loads:
        adviser.advise(load)
    adviser.advise(loads[-1])
    assert len(planner.asked) == KEPT + 1
    adviser.advise(loads[0])
    assert len(planner.asked) == KEPT + 2


@given(st.floats(1.0, 1e6), st.floats(0.01, 2.0))
def test_kinds_are_near_what_they_stand_for(tokens: float, grain: float) -> None:
    found = kind(tokens, grain)
    assert (
        abs(math.log(found / tokens)) <= grain / 2 + math.log(1 + 0.5 / min(found, tokens)) + 1e-9
    )
    assert kind(0.2, grain) == kind(math.nan, grain) == 0


@given(data=st.data(), share=st.floats(0.0, 1.0), gpus=st.none() | st.integers(2, 12))
def test_whatever_is_advised_the_limits_hold(
    data: st.DataObject, share: float, gpus: int | None
) -> None:
    limits = data.draw(all_limits())
    there = Counts(data.draw(st.integers(*limits.attention)), data.draw(st.integers(*limits.ffn)))
    decides = policy(Planner(), gpus=gpus)
    decides.adviser.advise = lambda load: Advice(share, "drawn")  # type: ignore[method-assign]
    proposal = decides.propose(view(data.draw(snapshots(there)), limits))
    if proposal.attention is None:
        assert proposal.ffn is None
    else:
        assert proposal.ffn is not None
        assert limits.allow(Counts(proposal.attention, proposal.ffn))
