"""The replay is what the full simulator does, where both can do it."""

from dataclasses import replace

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.latency import PRESETS
from planner.loads import Closed
from planner.lockstep import lane_loads, replay_closed_loop
from planner.setting import Setting
from planner.simulator import Cluster, simulate
from planner.sizing import points
from planner.workload import Fixed, Geometric, Independent, LogNormal, LogNormalJoint

NPU = PRESETS["deepseek-v3-npu"]
V1 = replace(NPU, transfer_load="attention")


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("latencies", [NPU, V1], ids=["v3", "v1"])
@pytest.mark.parametrize(("attention", "ffn"), [(1, 1), (7, 1), (20, 2)])
def test_equals_the_simulator_where_lengths_are_fixed(lanes, latencies, attention, ffn) -> None:
    batch, output, generations = 64, 40, 3
    load = Independent(Fixed(700), Fixed(output))
    imbalance = 1.2 if ffn > 1 else 1.0
    cluster = Cluster(latencies, attention, ffn, batch=batch, lanes=lanes, imbalance=imbalance)
    run = simulate(cluster, Closed(load, batch * lanes * generations))
    steps = output * generations
    replayed = replay_closed_loop(
        load, latencies, batch=batch, attention=[attention], ffn=ffn, lanes=lanes,
        imbalance=imbalance, steps=steps, warm_up=0, fresh=True,
    )  # fmt: skip
    way_back = latencies.t_transfer(float(batch if latencies is V1 else batch * attention)) / 2
    assert replayed.tau[0] * steps * lanes + way_back == pytest.approx(run.makespan, rel=1e-9)


@pytest.mark.parametrize("lanes", [2, 3])
def test_is_close_to_the_simulator_on_random_lengths(lanes) -> None:
    load = Independent(Geometric(200), Geometric(40))
    batch, attention = 32, 8
    replayed = replay_closed_loop(
        load, V1, batch=batch, attention=[attention], lanes=lanes, steps=1500
    )
    until = float(replayed.tau[0]) * lanes * 1500
    cluster = Cluster(V1, attention, batch=batch, lanes=lanes)
    run = simulate(cluster, Closed(load, None, stationary=True), seed=1, until=until)
    assert run.step_time / lanes == pytest.approx(replayed.tau[0], rel=0.01)
    assert run.per_instance == pytest.approx(replayed.per_instance[0], rel=0.01)
    assert run.idle_attention == pytest.approx(replayed.idle_attention[0], abs=0.02)
    assert run.idle_ffn == pytest.approx(replayed.idle_ffn[0], abs=0.02)


def test_loads_are_those_of_the_slots_one_by_one() -> None:
    load = Independent(Geometric(30), Geometric(6))
    drawn = lane_loads(load, 3, 2, 2, 400, seed=5, fresh=True)
    # the changes of the sum: +3 a step, and at a completion a prompt for a prompt and an output
    assert drawn.shape == (400, 2, 2)
    assert drawn.min() >= 0
    steady = np.mean(np.diff(drawn, axis=0) == 3)
    assert steady == pytest.approx((5 / 6) ** 3, abs=0.05)  # no completion in three slots


def test_loads_have_the_moments_of_the_workload() -> None:
    load = LogNormalJoint(LogNormal(200, 0.5), LogNormal(50, 0.5), 0.5)
    drawn = lane_loads(load, 16, 60, 2, 1500, seed=0)
    moments = load.moments()
    assert drawn.mean() == pytest.approx(16 * moments.theta, rel=0.02)
    assert drawn.var() == pytest.approx(16 * moments.nu2, rel=0.08)
    # stationary from the first step on
    assert drawn[0].mean() == pytest.approx(16 * moments.theta, rel=0.08)


def test_fresh_slots_hold_prompts_only() -> None:
    drawn = lane_loads(Independent(Fixed(10), Fixed(4)), 5, 1, 1, 9, seed=0, fresh=True)
    assert drawn[:, 0, 0].tolist() == [50, 55, 60, 65, 50, 55, 60, 65, 50]


def test_a_number_of_workers_does_not_change_anothers_result() -> None:
    load = Independent(Geometric(30_000), Geometric(6))
    given = {"batch": 8, "steps": 200, "seed": 3}
    some = replay_closed_loop(load, NPU, attention=[2, 5, 9], **given)
    less = replay_closed_loop(load, NPU, attention=[5, 9], **given)
    assert np.array_equal(some.tau[1:], less.tau)


def test_agrees_with_the_theory() -> None:
    load = Independent(Fixed(100), Geometric(101))
    counts = np.arange(2, 20)
    for lanes in (2, 4):
        found = replay_closed_loop(load, V1, batch=256, attention=counts, lanes=lanes, steps=1500)
        setting = Setting(load.moments(), V1, 256, lanes)
        expected = points(setting, counts)
        assert found.tau == pytest.approx(expected.tau, rel=0.01)
        assert found.idle_attention == pytest.approx(expected.idle_attention, abs=0.02)
        assert found.idle_ffn == pytest.approx(expected.idle_ffn, abs=0.02)


def test_same_seed_same_result() -> None:
    load = Independent(Geometric(30_000), Geometric(6))
    one, two = (
        replay_closed_loop(load, NPU, batch=8, attention=[2, 5], steps=200, seed=4).tau
        for _ in range(2)
    )
    assert np.array_equal(one, two)


def test_replicas_are_averaged() -> None:
    load = Independent(Geometric(30_000), Geometric(6))

    def rates(seed: int, replicas: int) -> np.ndarray:
        given = {"batch": 8, "attention": [2, 5], "steps": 200}
        return replay_closed_loop(load, NPU, **given, replicas=replicas, seed=seed).throughput

    one, other, both = rates(0, 1), rates(1 << 32, 1), rates(0, 2)
    assert both == pytest.approx((one + other) / 2)
    assert not np.array_equal(one, other)


def test_refuses_no_workers() -> None:
    load = Independent(Fixed(1), Fixed(1))
    with pytest.raises(PlannerError):
        replay_closed_loop(load, NPU, batch=8, attention=[])
    with pytest.raises(PlannerError):
        replay_closed_loop(load, NPU, batch=8, attention=[0, 1])
    with pytest.raises(PlannerError):
        replay_closed_loop(load, NPU, batch=0, attention=[1])
