"""What parts of a search come to together, and why there is no best."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from planner.explore.covered import seconds_where_covered
from planner.explore.found import NOWHERE, Found, Reach, better, merged, of_points
from planner.explore.kept import digest, point_data, read_point
from planner.explore.kernels.base import Array, NotCovered, Provenance, Time
from planner.explore.points import Mode, Targets
from planner.explore.refusals import refusal_of
from planner.kept import Kept
from tests.planner.explore.explorations import NOTHING, exploration, point

TARGETS = Targets(0.050, 0.015)


def test_points_survive_json() -> None:
    for mode in Mode:
        one = point(mode, 1000.0)
        assert read_point(json.loads(json.dumps(point_data(one)))) == one
    found = of_points([point(Mode.AFD, 1000.0)], TARGETS, Reach(memory=2.0, room=1.0, missing="x"))
    assert Found.read(json.loads(json.dumps(found.data()))) == found


def test_parts_together() -> None:
    slow = point(Mode.AFD, 5000.0, tpot=0.020)
    fast = point(Mode.AFD, 1000.0, tpot=0.010)
    late = point(Mode.AFD, 9000.0, ttft=0.090)
    one, other = of_points([slow], TARGETS), of_points([fast, late], TARGETS)
    assert one.best is None
    both = merged([one, other])
    assert both == merged([other, one])
    assert both.best == fast
    # ``late`` is as fast for the user as ``fast``, and serves more than all
    assert both.front == (late,)
    assert both.evaluated == 3
    assert both.reach.ttft == 0.040
    assert both.reach.tpot == 0.010
    assert merged([]) == Found()


def test_better() -> None:
    one = point(Mode.AFD, 1000.0)
    assert better(None, one, None) == one
    assert better() is None
    assert better(one, replace(one, tpot=0.001)).tpot == 0.001  # type: ignore[union-attr]


def test_reach_keeps_what_lacks_least() -> None:
    far, near = Reach(memory=300.0, room=100.0), Reach(memory=150.0, room=100.0)
    for both in (far | near, near | far, NOWHERE | near, near | NOWHERE):
        assert (both.memory, both.room) == (150.0, 100.0)
    assert (Reach(uncovered=2, missing="a") | Reach(uncovered=3)).uncovered == 5


@pytest.mark.parametrize(
    ("reach", "limit", "words"),
    [
        (Reach(ttft=0.1, tpot=0.01), "ttft", "2 times the 50 ms allowed"),
        (Reach(ttft=0.04, tpot=0.045), "tpot", "3 times the 15 ms allowed"),
        (Reach(ttft=0.1, tpot=0.016), "ttft", "TPOT is out of reach too, at best 16 ms"),
        (Reach(ttft=0.06, tpot=0.06), "tpot", "TTFT is out of reach too"),
        (Reach(ttft=0.04, tpot=0.01), "ttft and tpot", "at once"),
        (Reach(memory=3 * 1024**3, room=2 * 1024**3), "memory", "3.0 GiB"),
        (Reach(uncovered=7, missing="no kernels"), "kernels", "no kernels"),
        (NOWHERE, "gpus", "can't be divided"),
    ],
)
def test_why_there_is_none(reach: Reach, limit: str, words: str) -> None:
    refusal = refusal_of(exploration(NOTHING).question, Mode.PD, reach)
    assert refusal.limit == limit
    assert words in refusal.text
    if limit in ("ttft", "tpot", "memory"):
        assert refusal.needed > refusal.allowed
    else:
        assert math.isnan(refusal.needed)


def test_digest_is_of_all_that_decides() -> None:
    question = exploration(NOTHING).question
    keys = {
        digest(question, "a", "b"),
        digest(question, "a", "c"),
        digest(replace(question, gpus=64), "a", "b"),
        digest(replace(question, options=replace(question.options, fan="paper")), "a", "b"),
    }
    assert len(keys) == 4
    assert digest(question, "a", "b") in keys


def test_without_a_file_nothing_is_kept() -> None:
    kept = Kept(None, "key")
    assert kept.get("unit") is None
    kept.put("unit", {"a": 1})
    assert kept.get("unit") == {"a": 1}


def test_what_a_source_covers() -> None:
    loads = np.array([1.0, 100.0, 3.0, 50.0])

    def ask(chosen: Array) -> Time:
        if np.any(loads[chosen] > 10):
            refused = NotCovered("too large")
            refused.covered = loads[chosen] <= 10
            raise refused
        return Time({Provenance.MEASURED: 2 * loads[chosen]})

    seconds, refusal = seconds_where_covered(ask, len(loads))
    assert seconds == pytest.approx([2.0, math.nan, 6.0, math.nan], nan_ok=True)
    assert refusal == "too large"

    def never(chosen: Array) -> Time:
        raise NotCovered("nothing at all")

    seconds, refusal = seconds_where_covered(never, 2)
    assert np.isnan(seconds).all()
    assert refusal == "nothing at all"
