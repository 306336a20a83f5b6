"""Replays: what counts as met, what is paid for, what counts as going back and forth."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from autoscaler import hindsight, registry
from autoscaler.hindsight import best_static, best_timetable, busiest
from autoscaler.limits import Counts, Limits
from autoscaler.policy import SLO, Decision
from autoscaler.replay import Hopeless, Outcome, figures, oscillation, run, series, worst
from planner.kept import Kept
from planner.staff import Staff, worker_time

from .replays import Scripted, scenario, trace


def test_enough_workers_hold_the_targets_and_one_does_not() -> None:
    given = scenario([30.0])
    few, many = run(given, None), run(given.starting_with(6, 4), None)
    assert few.attainment < 0.5 < 0.95 < many.attainment
    assert many.requests == len(given.trace)
    assert not many.decisions
    assert many.changes == 0


def test_a_static_run_pays_for_its_workers_until_the_last_arrival() -> None:
    given = scenario([5.0])
    outcome = run(given.starting_with(3, 2), None)
    assert outcome.attention_seconds == pytest.approx(3 * outcome.horizon)
    assert outcome.actor_seconds == pytest.approx(5 * outcome.horizon)
    dear = replace(given, limits=Limits((1, 6), (1, 4), weight_ffn=8.0))
    outcome = run(dear.starting_with(3, 2), None)
    assert outcome.actor_seconds == pytest.approx((3 + 2 * 8) * outcome.horizon)


def test_starting_and_draining_workers_are_paid_for() -> None:
    given = scenario([5.0])
    outcome = run(given, Scripted((3, 1)))
    grown = next(d for d in outcome.decisions if d.target)
    # From the decision on, although they serve a second later.
    expected = outcome.horizon + 2 * (outcome.horizon - grown.at)
    assert outcome.attention_seconds == pytest.approx(expected)


def test_refused_and_unfinished_requests_are_missed() -> None:
    given = scenario([60.0])
    tight = replace(given, cluster=replace(given.cluster, max_queue=0), grace=0.1)
    outcome = run(tight, None)
    assert outcome.rejected > 0
    assert outcome.unfinished > 0
    served = outcome.requests - outcome.rejected - outcome.unfinished
    assert outcome.attainment * outcome.requests <= served
    assert outcome.ttft_met * outcome.requests <= served + outcome.unfinished


def test_slo_feedback_follows_a_step_of_the_load() -> None:
    given = scenario([5.0, 30.0, 5.0], seconds=30.0)
    outcome = run(given, registry.make("slo_feedback"))
    most = max(entry.attention_paid + entry.ffn_paid for entry in outcome.staff)
    static = run(given, None)
    assert outcome.changes >= 2
    assert most > 2
    assert outcome.attainment > static.attainment
    assert sum(outcome.reasons.values()) == len(outcome.decisions)


def test_the_same_replay_comes_to_the_same() -> None:
    given = scenario([20.0])
    first, second = (run(given, registry.make("slo_feedback")) for _ in range(2))
    assert figures(first) == figures(second)


def test_hopeless_runs_are_given_up() -> None:
    given = scenario([30.0], seconds=30.0)
    with pytest.raises(Hopeless):
        run(given, None, hopeless=0.9)
    assert run(given.starting_with(6, 4), None, hopeless=0.5).attainment > 0.5


def test_windows_cover_all_requests() -> None:
    outcome = run(scenario([20.0]), None, bins=10)
    assert len(outcome.windows) == 10
    assert sum(window.requests for window in outcome.windows) == outcome.requests
    met = sum(w.attainment * w.requests for w in outcome.windows if w.requests)
    assert met == pytest.approx(outcome.attainment * outcome.requests)
    shares = [window.attainment for window in outcome.worst]
    assert shares == sorted(shares)


def test_worst_windows_leave_out_those_with_few_requests() -> None:
    outcome = run(scenario([20.0]), None, bins=10)
    few = [replace(w, requests=1, attainment=0.0) for w in outcome.windows]
    assert worst(few) == []


def test_json_is_json() -> None:
    outcome = run(scenario([20.0]), Scripted((2, 2)))
    text = json.dumps([figures(outcome), series(outcome)])
    assert '"2A2F"' in text
    assert math.isfinite(figures(outcome)["ttft_p90"])


def decision(at: float, there: tuple[int, int], target: tuple[int, int] | None) -> Decision:
    return Decision(
        at, Counts(*there), None, Counts(*there), None if target is None else Counts(*target), ()
    )


def test_a_change_taken_back_soon_is_a_reversal_and_later_a_turn() -> None:
    steps = [
        decision(0.0, (1, 1), (2, 1)),
        decision(10.0, (2, 1), None),
        decision(100.0, (2, 1), (1, 1)),
        decision(2000.0, (1, 1), (2, 1)),
        decision(2010.0, (2, 1), (2, 2)),
    ]
    assert oscillation(steps) == (1, 2)
    assert oscillation(steps[:2]) == (0, 0)


@for_all(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=20))
def test_growing_only_never_turns(counts: list[tuple[int, int]]) -> None:
    attention = list(itertools.accumulate(c[0] for c in counts))
    steps = [
        decision(float(i), (old, 1), (new, 1))
        for i, (old, new) in enumerate(itertools.pairwise([1, *attention]))
        if new > old
    ]
    assert oscillation(steps) == (0, 0)


def test_worker_time_counts_what_is_there_until_the_end() -> None:
    staff = [Staff(0.0, 1, 0, 0, 1, 0), Staff(10.0, 1, 2, 0, 1, 0), Staff(20.0, 3, 0, 1, 2, 1)]
    assert worker_time(staff, 30.0) == (10 + 30 + 40, 10 + 10 + 30)
    assert worker_time(staff, 15.0) == (10 + 15, 15)


@settings(max_examples=50)
@for_all(
    st.lists(
        st.tuples(st.floats(0.1, 10.0), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    ),
    st.floats(1.0, 100.0),
)
def test_worker_time_is_between_the_least_and_the_most(rows, until: float) -> None:
    times = [0.0, *itertools.accumulate(row[0] for row in rows)]
    staff = [Staff(at, a, b, c, a, b) for at, (_, a, b, c) in zip(times, rows, strict=False)]
    attention, ffn = worker_time(staff, until)
    assert 0 <= ffn <= attention + 1e-9
    assert attention <= until * max(entry.attention_paid for entry in staff) + 1e-6


def test_hindsight_finds_the_cheapest_of_all_that_hold() -> None:
    given = scenario([20.0], seconds=10.0)
    given = replace(given, limits=Limits((1, 4), (1, 2)))
    found = best_static(given, jobs=1)
    every: dict[Counts, Outcome] = {
        Counts(a, f): run(given.starting_with(a, f), None)
        for a, f in itertools.product(range(1, 5), range(1, 3))
    }
    most = max(outcome.attainment for outcome in every.values())
    held = [c for c, outcome in every.items() if outcome.attainment >= 0.99 * most]
    cheapest = min(every[c].actor_seconds for c in held)
    assert found.outcome.actor_seconds == pytest.approx(cheapest)
    assert found.most == pytest.approx(most, abs=1e-9)
    assert found.counts not in found.dropped


def test_hindsight_goes_on_from_what_was_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(scenario([20.0], seconds=5.0), limits=Limits((1, 2), (1, 2)))
    file = tmp_path / "finished.jsonl"
    first = best_static(given, jobs=1, kept=Kept(file, "a"))
    lines = file.read_text().splitlines()
    asked: list[int] = []
    monkeypatch.setattr(hindsight, "run", lambda *a, **k: asked.append(1) or run(*a, **k))
    again = best_static(given, jobs=1, kept=Kept(file, "a"))
    assert not asked
    assert (again.counts, again.tried, again.dropped) == (first.counts, first.tried, first.dropped)
    assert figures(again.outcome) == pytest.approx(figures(first.outcome), nan_ok=True)
    assert series(again.outcome)["staff"] == series(first.outcome)["staff"]
    file.write_text("\n".join(lines[:-1]) + "\n")
    best_static(given, jobs=1, kept=Kept(file, "a"))
    assert len(asked) == 1, "only what is missing"
    best_static(given, jobs=1, kept=Kept(file, "another scenario"))
    assert len(asked) == 1 + len(lines)


def test_an_outcome_is_read_back_as_it_was() -> None:
    outcome = run(scenario([5.0, 20.0]), Scripted((3, 1)))
    acted = replace(outcome, decisions=[d for d in outcome.decisions if d.target is not None])
    back = hindsight.read_outcome(json.loads(json.dumps(hindsight.outcome_data(acted))))
    assert series(back)["changes"] == series(acted)["changes"]
    assert back.reasons == acted.reasons
    assert isinstance(back.staff[0], Staff)
    assert back.windows[0].requests == acted.windows[0].requests


def test_hindsight_under_a_fixed_budget_asks_all_splits() -> None:
    given = scenario([25.0], seconds=15.0)
    given = replace(given, limits=Limits((1, 6), (1, 4), min_total=5, max_total=5))
    found = best_static(given, jobs=1)
    assert set(found.tried) == {Counts(a, 5 - a) for a in range(1, 5)}
    assert found.outcome.attainment == max(found.tried.values())


def test_every_hour_by_itself_takes_what_that_hour_takes() -> None:
    given = scenario([3.0, 12.0], seconds=20.0)
    given = replace(given, limits=Limits((1, 5), (1, 2)))
    whole = best_static(given, jobs=1)
    found = best_timetable(given, 20.0, most=whole.most, jobs=1)
    assert len(found.counts) == 2
    assert found.counts[0].total < found.counts[1].total <= whole.counts.total
    assert found.attainment >= 0.99 * whole.most
    end = float(given.trace.arrival[-1])
    spent = 20.0 * found.counts[0].total + (end - 20.0) * found.counts[1].total
    assert found.actor_seconds == pytest.approx(spent)
    assert found.actor_seconds < whole.outcome.actor_seconds


def test_an_hour_without_requests_takes_the_least_there_may_be() -> None:
    given = scenario([10.0, 0.0, 10.0], seconds=10.0)
    given = replace(given, limits=Limits((2, 4), (1, 2)))
    assert best_timetable(given, 10.0, most=1.0, jobs=1).counts[1] == (2, 1)


def test_more_than_there_can_be_is_not_searched_for() -> None:
    given = replace(scenario([60.0], seconds=5.0), limits=Limits((1, 2), (1, 1)))
    known, told = best_static(given, jobs=1), best_static(given, jobs=1, most=1.0)
    assert known.most < 0.9
    assert told.counts == known.counts


def test_the_busiest_part_is_where_the_requests_are() -> None:
    busy = trace([2.0, 20.0, 2.0, 2.0])
    first, end = busiest(busy, 4)
    assert end - first > 300
    assert 15 < busy.arrival[first] < 25


def test_a_policy_may_be_told_other_stage_times() -> None:
    given = scenario([5.0])
    slower = given.cluster.latencies.scaled(attention=2.0)
    policy = Scripted((1, 1))
    run(replace(given, believed=slower), policy)
    assert policy.seen[-1].model.latencies == slower


def test_cached_prompts_are_quicker() -> None:
    given = scenario([20.0])
    cached = np.full(len(given.trace), 190)
    slow = replace(given, slo=SLO(0.5, 0.08))
    assert run(replace(slow, cached=cached), None).ttft_p90 < run(slow, None).ttft_p90
