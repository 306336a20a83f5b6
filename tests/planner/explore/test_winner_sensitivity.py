"""What moving an input does to the winner."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from planner.explore.kernels.base import KernelDB, Load, Sides
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.model import read_model
from planner.explore.points import Mode, Shape, Targets
from planner.explore.question import Exploration, Question
from planner.explore.scaled import Scaled
from planner.explore.search import explore
from planner.explore.system import find_system
from planner.explore.winner_sensitivity import changes, winner_sensitivity

SYSTEM = find_system("h200_sxm")
DB = RooflineDB(SYSTEM)
QUESTION = Question(
    read_model("qwen3-30b-a3b"),
    SYSTEM,
    4,
    Shape("short", 0, 512, 64),
    Targets(0.050, 0.004),
    modes=(Mode.AGGREGATED, Mode.AFD),
)


@pytest.fixture(scope="module")
def found() -> Exploration:
    return explore(QUESTION, DB, jobs=1)


def test_every_input_both_ways(found: Exploration) -> None:
    seen: list[tuple[str, float]] = []
    moved = winner_sensitivity(found, DB, jobs=1, progress=lambda *step: seen.append(step))
    by = {(one.input, one.factor): one for one in moved if not math.isnan(one.factor)}
    assert {name for name, _ in by} == {
        "network bandwidth", "attention time", "expert time", "TTFT allowed", "TPOT allowed"
    }  # fmt: skip
    assert [one.input for one in moved if math.isnan(one.factor)] == [
        "fan-out: paper", "overlap: paper"
    ]  # fmt: skip
    assert len(seen) == len(moved) == 12
    assert seen[-1][1] == 1.0
    for name, better, worse in (
        ("network bandwidth", 2.0, 0.5),
        ("attention time", 0.8, 1.2),
        ("expert time", 0.8, 1.2),
        ("TTFT allowed", 1.2, 0.8),
        ("TPOT allowed", 1.2, 0.8),
    ):
        assert by[name, better].change >= 0 >= by[name, worse].change
    assert by["attention time", 0.8].change > 0.01
    winner = found.winner
    assert winner is not None
    best = found.best[winner]
    assert best is not None
    for one in moved:
        assert one.flips == (one.winner != winner)
        assert one.tokens_per_s == pytest.approx(best.tokens_per_s * (1 + one.change))


def test_texts(found: Exploration) -> None:
    texts = [one.text for one in winner_sensitivity(found, DB, search=lambda q, a, b: found)]
    assert "network bandwidth x0.5" in texts
    assert "overlap: paper" in texts


def test_a_winner_that_is_lost(found: Exploration) -> None:
    nothing = replace(found, best=dict.fromkeys(found.best))

    def lost(question: Question, db: KernelDB, ffn_db: KernelDB) -> Exploration:
        return nothing if question.targets.tpot < QUESTION.targets.tpot else found

    for one in winner_sensitivity(found, DB, search=lost):
        gone = (one.input, one.factor) == ("TPOT allowed", 0.8)
        assert one.flips == gone
        assert one.change == (-1.0 if gone else 0.0)
        assert (one.winner is None) == gone
    # without a winner as asked there is nothing to compare with, only to gain
    for one in winner_sensitivity(nothing, DB, search=lambda q, a, b: found):
        assert one.flips
        assert math.isnan(one.change)


def test_both_sides_networks_are_moved() -> None:
    other = replace(QUESTION, ffn_system=find_system("h100_sxm"))
    name, factor, moved, _, _ = next(iter(changes(other, DB, DB)))
    assert (name, factor) == ("network bandwidth", 0.5)
    assert moved.ffn_system is not None
    assert other.ffn_system is not None
    assert moved.system.tiers[0].bandwidth == 0.5 * other.system.tiers[0].bandwidth
    assert moved.ffn_system.tiers[1].bandwidth == 0.5 * other.ffn_system.tiers[1].bandwidth


def test_scaled_times() -> None:
    model, sides = QUESTION.model, Sides()
    slow = Scaled(DB, attention=2.0, experts=3.0)
    load = Load(np.array([1.0, 8.0]), np.array([100.0]))
    plain = DB.attention(model, 1, sides, load).seconds
    assert slow.attention(model, 1, sides, load).seconds == pytest.approx(2 * plain)
    tokens = np.array([4.0])
    for time, factor in (
        (slow.experts(model, 1, 2, sides, tokens), 3.0),
        (DB.experts(model, 1, 2, sides, tokens), 1.0),
    ):
        assert time.seconds == pytest.approx(
            factor * DB.experts(model, 1, 2, sides, tokens).seconds
        )
    exchange = (model, 1, 4, 1, 4, tokens)
    assert slow.exchange(*exchange).seconds == pytest.approx(DB.exchange(*exchange).seconds)
    assert "x2" in slow.name
