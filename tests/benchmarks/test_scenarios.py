"""Scenarios: the same requests for the same seed, lengths that fit, prefixes that are shared."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.scenarios import (
    CHAT,
    FIRST_ID,
    LONG,
    NAMES,
    SCENARIOS,
    Asked,
    BadScenario,
    Phase,
    Piece,
    as_arrivals,
    draw,
    from_trace,
    phases_of,
    prompt_ids,
)
from planner.trace_files import BLOCK_TOKENS
from planner.traces import Trace

ROOM = 1024

lengths = st.tuples(st.integers(1, 100), st.integers(0, 100)).map(lambda t: (t[0], t[0] + t[1]))
phases = st.builds(
    Phase,
    name=st.sampled_from(["chat", "coding", "agentic"]),
    seconds=st.floats(0.5, 20),
    rate=st.floats(0.5, 20),
    prompt=lengths,
    output=lengths,
    shared=st.integers(0, 400),
    groups=st.integers(1, 3),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(phases, min_size=1, max_size=4), st.integers(0, 1000))
def test_draws_fit_and_repeat(drawn: list[Phase], seed: int):
    scenario = draw("any", drawn, seed=seed, room=ROOM)
    assert scenario == draw("any", drawn, seed=seed, room=ROOM)
    assert scenario.seconds == pytest.approx(sum(phase.seconds for phase in drawn))
    assert [asked.at for asked in scenario.asked] == sorted(asked.at for asked in scenario.asked)
    for asked in scenario.asked:
        phase = drawn[scenario.phase_at(asked.at)]
        assert asked.phase == phase.name
        assert phase.output[0] <= asked.output <= phase.output[1]
        assert phase.prompt[0] <= asked.tokens - phase.shared <= phase.prompt[1]
        assert asked.tokens + asked.output <= ROOM


def test_another_seed_is_another_draw():
    first, second = (draw("shift", [CHAT], seed=seed, room=ROOM) for seed in (0, 1))
    assert first.asked != second.asked


def test_arrivals_come_at_the_rate():
    scenario = draw("steady", phases_of("steady", duration=600.0), seed=0, room=ROOM)
    count = len(scenario.asked)
    assert count == pytest.approx(600 * CHAT.rate, rel=0.06)
    gaps = np.diff([asked.at for asked in scenario.asked])
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # as of a Poisson process


def test_shift_goes_there_and_back():
    scenario = draw("shift", phases_of("shift"), seed=0, room=ROOM)
    assert [name for _, name in scenario.phases] == ["chat", "long-context", "chat"]
    assert scenario.shifts == 2
    contexts = [
        np.mean([asked.tokens for asked in scenario.asked if scenario.phase_at(asked.at) == phase])
        for phase in range(3)
    ]
    assert contexts[1] > 4 * contexts[0] and contexts[1] > 4 * contexts[2]


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_quick_is_the_same_in_less_time(name: str):
    whole, quick = phases_of(name), phases_of(name, quick=True)
    assert [phase.name for phase in quick] == [phase.name for phase in whole]
    assert sum(p.seconds for p in quick) < 0.5 * sum(p.seconds for p in whole)
    assert draw(name, quick, seed=0, room=ROOM).asked


def test_refusals():
    with pytest.raises(BadScenario, match=r"shift.*steady"):
        phases_of("chaos")
    with pytest.raises(BadScenario, match="at least one phase"):
        draw("none", [], seed=0, room=ROOM)
    with pytest.raises(BadScenario, match="200"):
        draw("shift", [LONG], seed=0, room=200)
    with pytest.raises(BadScenario, match="above 0"):
        Phase("x", 1.0, 0.0, prompt=(1, 1), output=(1, 1))
    with pytest.raises(BadScenario, match="prompt of 5 to 4"):
        Phase("x", 1.0, 1.0, prompt=(5, 4), output=(1, 1))
    with pytest.raises(BadScenario, match="0 groups"):
        Phase("x", 1.0, 1.0, prompt=(1, 1), output=(1, 1), groups=0)
    assert "trace" in NAMES


# -- prompts -------------------------------------------------------------------------------------


def test_prompts_of_a_group_begin_alike():
    one = Asked(0.0, "x", (Piece("doc 1", 64), Piece("own 1", 8)), 4)
    two = Asked(1.0, "x", (Piece("doc 1", 64), Piece("own 2", 8)), 4)
    other = Asked(2.0, "x", (Piece("doc 2", 64), Piece("own 3", 8)), 4)
    ids = [prompt_ids(asked, 4096) for asked in (one, two, other)]
    assert [len(row) for row in ids] == [72, 72, 72]
    assert ids[0][:64] == ids[1][:64] != ids[2][:64]
    assert ids[0][64:] != ids[1][64:]
    assert min(map(min, ids)) >= FIRST_ID and max(map(max, ids)) < 4096


def test_a_clipped_piece_is_a_beginning_of_the_whole():
    long = Asked(0.0, "x", (Piece("block 7", 512),), 4)
    short = Asked(0.0, "x", (Piece("block 7", 100),), 4)
    assert prompt_ids(short, 4096) == prompt_ids(long, 4096)[:100]


def test_what_came_before_is_cached_in_the_simulator():
    asked = [
        Asked(0.0, "x", (Piece("doc", 300), Piece("own 0", 40)), 4),
        Asked(1.0, "x", (Piece("doc", 300), Piece("own 1", 40)), 4),
        Asked(2.0, "x", (Piece("doc", 300), Piece("own 1", 40)), 4),
        Asked(3.0, "x", (Piece("other", 300),), 4),
    ]
    arrivals = list(as_arrivals(asked).items)
    assert [a.cached for a in arrivals] == [0, 300, 339, 0]  # the last token is always computed
    assert [a.prompt for a in arrivals] == [340, 340, 340, 300]
    assert [a.cached for a in as_arrivals(asked, block=128).items] == [0, 256, 256, 0]


# -- traces --------------------------------------------------------------------------------------


def trace(blocks: bool = False) -> Trace:
    return Trace(
        arrival=np.array([0.0, 10.0, 20.0, 100.0]),
        prompt=np.array([100, 4000, 1500, 10]),
        output=np.array([10, 50, 2000, 1]),
        blocks=((1,), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 9), (5,)) if blocks else None,
        source="some.csv",
    )


def test_a_trace_is_clipped_with_a_note():
    scenario = from_trace(trace(), speed=10.0, room=ROOM)
    assert [asked.at for asked in scenario.asked] == [0.0, 1.0, 2.0, 10.0]
    assert [asked.output for asked in scenario.asked] == [10, 50, 256, 1]
    assert [asked.tokens for asked in scenario.asked] == [100, 974, 768, 10]
    assert scenario.notes == (
        "2 of 4 prompts were clipped to the model's 1024 tokens",
        "1 of 4 answers were clipped to the model's 1024 tokens",
    )
    assert scenario.phases == ((0.0, "trace"),) and scenario.seconds == 10.0


def test_a_trace_keeps_its_shared_blocks():
    asked = from_trace(trace(blocks=True), speed=1.0, room=2 * BLOCK_TOKENS + 50).asked
    assert asked[0].prompt == (Piece("block 1", 100),)
    assert asked[1].prompt == (Piece("block 1", BLOCK_TOKENS), Piece("block 2", BLOCK_TOKENS))
    cached = [arrival.cached for arrival in as_arrivals(asked).items]
    assert cached[1] == 100 and cached[2] > BLOCK_TOKENS


def test_a_trace_is_cut_off_in_time():
    scenario = from_trace(trace(), speed=1.0, room=ROOM, limit_s=15.0)
    assert len(scenario.asked) == 2 and scenario.seconds == 15.0
    late = Trace(arrival=np.array([0.0]), prompt=np.array([5]), output=np.array([5]))
    assert from_trace(late, speed=1.0, room=ROOM).seconds == 1.0


def test_traces_refused():
    for options in ({"speed": 0.0, "room": ROOM}, {"speed": 1.0, "room": 4}):
        with pytest.raises(BadScenario, match="speed"):
            from_trace(trace(), **options)
