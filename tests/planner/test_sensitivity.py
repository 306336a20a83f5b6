"""What errors in the inputs do."""

from dataclasses import replace

import pytest

from planner.errors import PlannerError
from planner.latency import PRESETS
from planner.moments import Moments
from planner.sensitivity import naive_cost, sensitivity
from planner.setting import Setting

BASE = Setting(Moments(600.0, 250_000.0, 100.0, 500.0), PRESETS["deepseek-v3-npu"], 256)


def test_every_input_is_moved_both_ways() -> None:
    effects = sensitivity(BASE)
    names = ["a_A", "b_A", "a_F", "b_F", "a_C", "b_C", "theta", "nu2", "batch"]
    assert [e.name for e in effects] == [n for n in names for _ in range(2)]
    assert [e.change for e in effects] == [-0.1, 0.1] * len(names)
    assert all(0.0 <= e.loss < 0.2 for e in effects)


def test_directions() -> None:
    by = {(e.name, e.change): e for e in sensitivity(BASE)}
    assert by["a_A", 0.1].ratio > by["a_A", -0.1].ratio
    assert by["theta", 0.1].ratio > by["theta", -0.1].ratio
    assert by["a_F", 0.1].ratio < by["a_F", -0.1].ratio
    # the load enters only as a_A * theta (and its spread)
    assert by["theta", 0.1].ratio == pytest.approx(by["a_A", 0.1].ratio, rel=0.01)


def test_imbalance_matters_with_several_ffn_workers() -> None:
    effects = {(e.name, e.change): e for e in sensitivity(replace(BASE, imbalance=1.2), ffn=4)}
    assert effects["imbalance", 0.1].ratio < effects["imbalance", -0.1].ratio


def test_nothing_is_lost_by_no_error() -> None:
    assert all(e.loss < 1e-3 for e in sensitivity(BASE, error=1e-3))


def test_small_batches_move_by_a_slot() -> None:
    effects = {(e.name, e.change): e for e in sensitivity(replace(BASE, batch=2))}
    assert effects["batch", 0.1].ratio != effects["batch", -0.1].ratio


@pytest.mark.parametrize("error", [0.0, 1.0, -0.1])
def test_refuses_errors_out_of_range(error: float) -> None:
    with pytest.raises(PlannerError, match="error"):
        sensitivity(BASE, error=error)


def test_the_naive_rule_costs_what_the_load_is_off() -> None:
    assert naive_cost(BASE).loss == pytest.approx(0.0, abs=1e-9)
    half = naive_cost(replace(BASE, moments=replace(BASE.moments, theta=1200.0)))
    assert half.naive_load == 600.0 and half.theta == 1200.0
    assert half.naive_ratio < half.ratio
    assert 0.01 < half.loss < 0.5
