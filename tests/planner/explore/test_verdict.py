"""What is said of an exploration: the level that pays, by how much, why, and how surely."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.explore.kernels.base import Provenance
from planner.explore.points import Mode
from planner.explore.question import Refusal
from planner.explore.verdict import counts, judge, limit, seconds
from tests.planner.explore.explorations import (
    AFD_WINS,
    NOTHING,
    exploration,
    group,
    point,
    refusal,
)


def test_the_level_that_pays_and_why_not_the_others() -> None:
    verdict = judge(exploration(AFD_WINS), flips=())
    assert verdict.winner is Mode.AFD and verdict.pays
    assert verdict.second is Mode.PD_AFD
    assert verdict.lead == pytest.approx(3970 / 763 - 1)
    for words in (
        "AFD pays: 3,970 tokens/s on 128 GPUs (16A+112F), 5.2 times P/D with AFD (763)",
        "aggregation is out by TTFT (93 ms at best, 50 ms allowed)",
        "P/D is out by TPOT (18.2 ms at best, 15 ms allowed)",
        "P/D with AFD is limited by FFN, 60% of its stages' time",
        "Confidence: high.",
    ):
        assert words in verdict.text


def test_aggregation_that_wins_says_that_disaggregation_does_not_pay() -> None:
    best = {
        Mode.AGGREGATED: point(Mode.AGGREGATED, 1300.0),
        Mode.AFD: point(Mode.AFD, 1000.0, ttft=0.0495),
    }
    verdict = judge(exploration(best))
    assert not verdict.pays and verdict.winner is Mode.AGGREGATED
    assert verdict.text.startswith("Disaggregation does not pay: aggregation serves most")
    assert "30% more than AFD (1,000)" in verdict.text
    assert "AFD is limited by TTFT (49.5 ms of 50 ms)" in verdict.text


def test_one_level_alone_is_not_said_to_beat_anything() -> None:
    verdict = judge(exploration({Mode.AGGREGATED: point(Mode.AGGREGATED, 10.0)}))
    assert "does not pay" not in verdict.text
    assert verdict.text.startswith("Aggregation, the one level asked for, holds the targets: 10")
    assert math.isinf(verdict.lead) and verdict.second is None


def test_a_small_lead_hardly_pays() -> None:
    best = {
        Mode.AGGREGATED: point(Mode.AGGREGATED, 1000.0),
        Mode.PD: point(Mode.PD, 1050.0),
    }
    verdict = judge(exploration(best), flips=())
    assert "P/D hardly pays" in verdict.text
    assert verdict.confidence == "medium"


def test_nothing_that_holds_names_the_limits_and_the_nearest() -> None:
    verdict = judge(exploration(NOTHING))
    assert verdict.winner is None and not verdict.pays and math.isnan(verdict.lead)
    for words in (
        "No level holds TTFT 50 ms and TPOT 15 ms",
        "Aggregation: TTFT (93 ms at best, 50 ms allowed)",
        "P/D: kernels",
        "Nearest is AFD, over by 10%",
    ):
        assert words in verdict.text
    assert verdict.confidence == "low"


def test_memory_is_said_in_gib() -> None:
    short = refusal("memory", 200 * 2.0**30, 162 * 2.0**30)
    text = judge(exploration({**AFD_WINS, Mode.PD: short})).text
    assert "memory (200 GiB a GPU needed, 162 there)" in text


@pytest.mark.parametrize(
    ("change", "flips", "confidence", "doubt"),
    [
        ({"shares": {Provenance.ROOFLINE: 1.0}}, (), "low", "0% of the time rests on meas"),
        (
            {"shares": {Provenance.MEASURED: 0.7, Provenance.EXTRAPOLATED: 0.3}},
            (),
            "medium",
            "70% of the time",
        ),
        ({"tpot_safe": 0.016}, (), "low", "TPOT is 16 ms, above the target"),
        ({"tpot_safe": 0.0125}, (), "medium", "25% longer"),
        ({}, ("network -20 %",), "low", "another level wins with network -20 %"),
        ({}, (), "high", ""),
    ],
)
def test_confidence_follows_from_provenance_bound_and_sensitivity(
    change: dict[str, object], flips: tuple[str, ...], confidence: str, doubt: str
) -> None:
    best = {**AFD_WINS, Mode.AFD: point(Mode.AFD, 3970.0, **change)}
    verdict = judge(exploration(best), flips)
    assert verdict.confidence == confidence
    assert doubt in "; ".join(verdict.doubts)
    assert bool(verdict.doubts) == (confidence != "high")


def test_a_level_that_was_never_measured_is_a_doubt() -> None:
    unknown = Refusal("kernels", math.nan, math.nan, "nothing measured")
    verdict = judge(exploration({**AFD_WINS, Mode.PD: unknown}), flips=())
    assert verdict.confidence == "medium"
    assert "nothing is measured for P/D" in verdict.text


def test_counts_of_gpus_by_what_they_do() -> None:
    afd = point(Mode.AFD, 1.0)
    twice = (group("attention", 8, 2), group("ffn", 56, 2))
    mixed = (group("prefill", 4, 6), group("decode", 16, 5))
    assert counts(afd) == "16A+112F"
    assert counts(replace(afd, groups=twice)) == "2x(8A+56F)"
    assert counts(replace(afd, groups=mixed)) == "6x4P+5x16D"
    assert counts(point(Mode.AGGREGATED, 1.0)) == "4x32"
    assert counts(point(Mode.PD_AFD, 1.0)) == "8x8P+8DA+56DF"


def test_a_limit_without_parts_or_near_targets_is_nothing() -> None:
    found = exploration(AFD_WINS)
    assert limit(point(Mode.AFD, 1.0, parts={}), found.question.targets) == ""
    assert seconds(math.inf) == "any" and seconds(1.25) == "1.25 s"


rates = st.floats(1.0, 1e6)


@given(st.dictionaries(st.sampled_from(list(Mode)), st.none() | rates, min_size=1))
def test_the_winner_serves_most_and_everything_asked_for_is_spoken_of(
    given: dict[Mode, float | None],
) -> None:
    best = {m: refusal() if rate is None else point(m, rate) for m, rate in given.items()}
    found = exploration(best)
    verdict = judge(found)
    held = {m: rate for m, rate in given.items() if rate is not None}
    if not held:
        assert verdict.winner is None
        return
    assert held[verdict.winner] == max(held.values())
    assert verdict.pays == (verdict.winner is not Mode.AGGREGATED)
    assert verdict.lead >= 0
    assert verdict.text.count("is out by") == len(given) - len(held)
