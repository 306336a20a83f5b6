"""Symptoms of a system that has too little."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from autoscaler.limits import Limits
from autoscaler.policies.saturation import Saturation, idle, measure, slots_used
from autoscaler.policy import View
from planner.control import Snapshot
from planner.digest import Percentiles
from tests.autoscaler.views import SYSTEM, TARGETS, latency, snapshot, view


def test_saturation_is_p90_over_target():
    seen = measure(view(snapshot(ttft=1.0, tpot=0.25, kv_usage=0.45)))
    assert seen == Saturation(ttft=0.5, tpot=2.5, kv=0.5)
    assert seen.worst == 2.5
    assert str(seen) == "tpot 2.50, ttft 0.50, kv 0.50"


def test_few_requests_speak_by_their_median():
    spread = Percentiles(4, 2.0, 0.1, 1.0, 9.0, 9.0, 9.0)
    assert measure(view(snapshot(), limits=None)).ttft == 0.5
    assert measure(view(replace(snapshot(), ttft=spread))).ttft == 0.5
    assert measure(view(replace(snapshot(), ttft=replace(spread, count=5)))).ttft == 4.5


@pytest.mark.parametrize(("percentile", "share"), [(0.5, 1.0), (0.9, 2.0), (0.95, 3.0)])
def test_the_percentile_of_the_targets_decides(percentile: float, share: float):
    spread = Percentiles(100, 2.0, 1.0, 2.0, 4.0, 6.0, 8.0)
    seen = replace(snapshot(), ttft=spread)
    at = View(seen, replace(TARGETS, percentile=percentile), Limits(), SYSTEM)
    assert measure(at).ttft == share


def test_gaps_stand_in_for_tpot_while_nothing_completes():
    seen = replace(snapshot(), tpot=Percentiles(), itl=latency(0.2))
    assert measure(view(seen)).tpot == 2.0


def test_a_queue_counts_by_what_gets_its_first_token_in_time():
    # 100 first tokens in 20 s: ten of those that wait get theirs within 2 s.
    assert measure(view(snapshot(waiting=11))).queue == pytest.approx(1.0)
    stuck = snapshot(waiting=3, ttft=math.nan)
    assert measure(view(replace(stuck, ttft=Percentiles()))).queue == 3.0


def test_refusals_are_always_too_many():
    assert measure(view(snapshot(rejected=1))).refused == pytest.approx(1.01)


def test_empty_telemetry_is_an_idle_system():
    empty = Snapshot(now=0.0, window=20.0, attention=4, ffn=4)
    assert idle(empty)
    assert measure(view(empty)) == Saturation()
    assert str(Saturation()) == "idle"
    assert slots_used(view(replace(empty, attention=0))) == 1.0
