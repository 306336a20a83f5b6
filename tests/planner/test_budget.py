"""Plans under a budget, against brute force."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.budget import Budget, plan_budget, prefill_front
from planner.errors import PlannerError
from planner.latency import PRESETS, Linear
from planner.moments import Moments
from planner.points import point
from planner.setting import Setting
from planner.workload import workload

NPU = PRESETS["deepseek-v3-npu"]
BASE = Setting(Moments(600.0, 250_000.0, 100.0, 500.0), NPU, 256, lanes=2)


def brute_force(setting: Setting, budget: Budget, objective: str) -> tuple[float, int]:
    """Best objective, and how many pairs hold every limit."""
    best, count = 0.0, 0
    gpus = budget.gpus - budget.prefill_gpus
    for f in range(budget.min_ffn, (budget.max_ffn or gpus) + 1):
        for a in range(1, gpus + 1):
            if a * budget.gpus_per_attention + f * budget.gpus_per_ffn > gpus:
                continue
            at = point(setting, a, f)
            if budget.max_tpot is not None and at.tpot > budget.max_tpot:
                continue
            if budget.min_throughput is not None and at.throughput < budget.min_throughput:
                continue
            count += 1
            best = max(best, at.throughput if objective == "throughput" else at.per_cost)
    return best, count


@settings(max_examples=15, deadline=None)
@given(
    gpus=st.integers(4, 24),
    per_attention=st.integers(1, 2),
    per_ffn=st.integers(1, 3),
    min_ffn=st.integers(1, 2),
    max_tpot=st.sampled_from([None, 500.0, 650.0, 900.0]),
    min_throughput=st.sampled_from([None, 4.0]),
    objective=st.sampled_from(["throughput", "cost"]),
    price=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_is_what_brute_force_finds(
    gpus, per_attention, per_ffn, min_ffn, max_tpot, min_throughput, objective, price
) -> None:
    setting = replace(BASE, price_ffn=price)
    budget = Budget(gpus, per_attention, per_ffn, max_tpot, min_throughput, min_ffn=min_ffn)
    best, count = brute_force(setting, budget, objective)
    if not count:
        with pytest.raises(PlannerError):
            plan_budget(setting, budget, objective=objective)
        return
    plan = plan_budget(setting, budget, objective=objective)
    at = plan.best.point
    value = at.throughput if objective == "throughput" else at.per_cost
    assert value == pytest.approx(best, rel=1e-12)
    assert plan.best.gpus <= gpus
    assert plan.best.loss == 0.0


def test_alternatives_and_counts() -> None:
    plan = plan_budget(BASE, Budget(32))
    assert plan.considered == 32 * 31 / 2
    losses = [choice.loss for choice in plan.alternatives]
    assert losses == sorted(losses) and all(0 <= loss < 1 for loss in losses)
    assert len({c.point.ffn for c in (plan.best, *plan.alternatives)}) == 1 + len(losses)
    assert plan.to_dict()["best"]["gpus"] == plan.best.gpus


def test_large_budgets_are_quick_and_exact_enough() -> None:
    plan = plan_budget(BASE, Budget(400, gpus_per_ffn=2))
    at = plan.best.point
    near = [
        point(BASE, a, f).throughput
        for f in range(int(at.ffn) - 2, int(at.ffn) + 3)
        for a in [400 - 2 * f]
    ]
    assert at.throughput == pytest.approx(max(near))


def test_prefill_takes_its_share() -> None:
    full, less = plan_budget(BASE, Budget(32)), plan_budget(BASE, Budget(32, prefill_gpus=8))
    assert less.best.gpus <= 24
    assert less.best.point.throughput < full.best.point.throughput


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does() -> None:
    with pytest.raises(PlannerError, match="a batch of 83 fits"):
        plan_budget(BASE, Budget(32, kv_tokens=100_000))
    assert plan_budget(BASE, Budget(32, kv_tokens=400_000)).best
    with pytest.raises(PlannerError, match="not even"):
        plan_budget(BASE, Budget(32, kv_tokens=100))


def test_limits_that_nothing_holds_are_named() -> None:
    with pytest.raises(PlannerError, match=r"max_tpot refused \d+"):
        plan_budget(BASE, Budget(16, max_tpot=10.0))
    with pytest.raises(PlannerError, match="min_throughput"):
        plan_budget(BASE, Budget(16, min_throughput=1e9))


@pytest.mark.parametrize(
    "budget", [Budget(1), Budget(8, gpus_per_ffn=8), Budget(16, prefill_gpus=15)]
)
def test_budgets_that_hold_nothing(budget: Budget) -> None:
    with pytest.raises(PlannerError, match="give more GPUs"):
        plan_budget(BASE, budget)


def test_refuses_bad_arguments() -> None:
    with pytest.raises(PlannerError, match="gpus_per_ffn"):
        Budget(8, gpus_per_ffn=0)
    with pytest.raises(PlannerError, match="max_ffn"):
        Budget(8, min_ffn=4, max_ffn=3)
    with pytest.raises(PlannerError, match="objective"):
        plan_budget(BASE, Budget(8), objective="beauty")  # type: ignore[arg-type]
    with pytest.raises(PlannerError, match="larger units"):
        plan_budget(BASE, Budget(10_000))


def test_prefill_front() -> None:
    latencies = replace(NPU, prefill=Linear(0.5, 10.0))
    load = workload("fixed:100,geometric:501")
    # 50 requests per 1000 cycles, 60 cycles each: 3 busy workers
    front = prefill_front(25.0, load, latencies, utilisation=0.8)
    assert front.request_rate == pytest.approx(25.0 / 500)
    assert front.prefill_time == pytest.approx(60.0)
    assert front.workers == 4
    assert front.utilisation == pytest.approx(0.75)
    reused = prefill_front(25.0, replace(load, reuse=0.5), latencies)
    assert reused.prefill_time == pytest.approx(35.0)
    with pytest.raises(PlannerError, match="prefill curve"):
        prefill_front(25.0, load, NPU)
    with pytest.raises(PlannerError, match="utilisation"):
        prefill_front(25.0, load, latencies, utilisation=0.0)
