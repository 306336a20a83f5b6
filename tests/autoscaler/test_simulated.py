"""The core in the simulator: what it is shown, and that what it decides is carried out."""

import math
from dataclasses import replace

import pytest

from autoscaler.core import Core
from autoscaler.model import Model
from autoscaler.reasons import Reason
from autoscaler.simulated import Simulated, with_moments
from planner.control import Snapshot, Target
from planner.loads import replay as arrivals_of
from planner.simulator import simulate

from .replays import LATENCIES, TIMING, Scripted, scenario


def simulated(policy, given, model=None, **timing):
    core = Core(policy, given.limits, given.slo, given.system, replace(TIMING, **timing))
    return Simulated(core, model)


def test_targets_are_carried_out_with_the_times_that_changes_take() -> None:
    given = scenario([5.0])
    adapter = simulated(Scripted((3, 2)), given)
    result = simulate(
        given.cluster, arrivals_of(given.trace), policy=adapter, interval=1.0, window=4.0
    )
    first = next(d for d in adapter.decisions if d.target)
    assert first.target == (3, 2)
    assert (result.attention_left, result.ffn_left) == (3, 2)
    grown = next(entry for entry in result.staff if entry.attention == 3)
    assert grown.at == pytest.approx(first.at + 1.0)
    assert sum(d.target is not None for d in adapter.decisions) == 1


def test_nothing_is_decided_while_workers_start() -> None:
    given = scenario([5.0])
    slow = replace(given.cluster.changes, prepare_attention=5.0)
    policy = Scripted((2, 1), (3, 1))
    adapter = simulated(policy, given, cooldown=0.0)
    simulate(
        replace(given.cluster, changes=slow),
        arrivals_of(given.trace),
        policy=adapter,
        interval=1.0,
        window=4.0,
    )
    first = next(d for d in adapter.decisions if d.target)
    waiting = [d for d in adapter.decisions if first.at < d.at < first.at + 5.0]
    assert waiting
    assert all(d.target is None for d in waiting)
    assert any(Reason.CHANGING in d.reasons for d in waiting)


def test_the_policy_sees_the_model_with_the_moments_of_the_window() -> None:
    given = scenario([5.0])
    policy = Scripted((1, 1))
    adapter = simulated(policy, given, Model(LATENCIES))
    simulate(given.cluster, arrivals_of(given.trace), policy=adapter, interval=1.0, window=4.0)
    late = policy.seen[-1]
    assert late.model.latencies == LATENCIES
    assert late.model.prompt_mean == 200
    assert 20 <= late.model.output_mean <= 40
    assert late.model.theta == pytest.approx(200 + late.model.output_mean / 2, rel=0.1)
    assert 0 <= late.snapshot.kv_usage <= 1
    assert late.snapshot.prefix_hit == 0
    assert late.snapshot.imbalance == 1


def test_moments_that_are_not_known_stay_as_they_were() -> None:
    model = Model(LATENCIES, theta=300.0, prompt_mean=200.0)
    shown = with_moments(model, Snapshot(now=1.0, window=1.0, attention=1, ffn=1))
    assert shown is model
    shown = with_moments(
        model, Snapshot(now=1.0, window=1.0, attention=1, ffn=1, theta=400.0, nu2=math.nan)
    )
    assert shown.theta == 400.0
    assert shown.prompt_mean == 200.0


def test_wall_time_goes_with_the_simulation() -> None:
    given = scenario([5.0])
    policy = Scripted((1, 1))
    core = Core(policy, given.limits, given.slo, given.system, TIMING)
    adapter = Simulated(core, wall=1000.0)
    window = Snapshot(now=7.0, window=5.0, attention=1, ffn=1)
    assert adapter.decide(window) is None
    assert policy.seen[0].wall == 1007.0


def test_a_decision_is_a_target_of_the_simulator() -> None:
    given = scenario([5.0])
    adapter = simulated(Scripted((2, 2)), given)
    assert adapter.decide(Snapshot(now=3.0, window=3.0, attention=1, ffn=1)) == Target(2, 2)
