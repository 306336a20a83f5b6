"""Gaps, pauses and wrong tokens of made-up streams."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.gaps import (
    commit_pause,
    figures,
    gap_after,
    longest_between,
    token_gaps,
    token_rate,
    wrong_tokens,
)
from benchmarks.load import Stream


def stream(*times: float, asked: int = 0, error: str = "", ended: float = 0.0) -> Stream:
    return Stream(asked, times[0] - 0.1, list(times), list(range(len(times))), ended, error)


def test_gaps_of_several_streams_are_in_order():
    gaps = token_gaps([stream(1.0, 1.0, 1.5, 3.0), stream(0.5, 2.0)])
    assert gaps.tolist() == [[0.5, 2.0], [1.0, 1.5], [1.5, 3.0]]
    assert token_gaps([]).shape == (0, 2)


def test_a_stream_that_broke_off_counts_to_its_end():
    assert token_gaps([stream(1.0, error="lost", ended=9.0)]).tolist() == [[1.0, 9.0]]
    assert token_gaps([stream(1.0, ended=9.0)]).shape == (0, 2)


def test_an_event_is_blamed_for_what_began_with_it_only():
    gaps = np.array([[0.0, 0.9], [0.9, 3.0], [5.0, 50.0]])
    assert gap_after(gaps, at=1.0) == pytest.approx(2.1)
    assert gap_after(gaps, at=2.9) == pytest.approx(2.1)
    assert gap_after(gaps, at=4.5) == pytest.approx(45.0)
    assert gap_after(gaps, at=3.5) == 0.0


def test_a_pause_is_what_exceeds_the_usual():
    ticks = [0.05 * i for i in range(100)]
    steady = stream(*ticks)
    assert commit_pause(token_gaps([steady]), 2.0, 2.01) == pytest.approx(0.0, abs=1e-6)
    held = stream(*[t for t in ticks if not 2.02 < t < 2.12])
    assert commit_pause(token_gaps([held]), 2.0, 2.01) == pytest.approx(0.1, abs=1e-6)
    assert commit_pause(token_gaps([]), 2.0, 2.01) == 0.0


def test_every_kind_of_wrong_token_is_seen():
    truth = [Stream(0, 0.0, [], [5, 6, 7]), Stream(1, 0.0, [], [8])]
    got = [
        Stream(0, 0.0, [], [5, 6, 7]),
        Stream(0, 0.0, [], [5, 6]),
        Stream(0, 0.0, [], [5, 6, 6, 7]),
        Stream(1, 0.0, [], [9]),
        Stream(0, 0.0, [], [5], error="lost"),
        Stream(0, 0.0, [], [6], error="lost"),
    ]
    assert wrong_tokens(got, truth) == [1, 2, 3, 5]


@pytest.mark.parametrize(
    ("truth", "words"),
    [
        ([], "has no request 0"),
        ([Stream(0, 0.0, error="HTTP 503")], "HTTP 503"),
        ([Stream(0, 0.0, [], [1]), Stream(0, 0.0, [], [2])], "contradicts itself"),
    ],
)
def test_a_reference_that_is_none_is_refused(truth: list[Stream], words: str):
    with pytest.raises(ValueError, match=words):
        wrong_tokens([Stream(0, 0.0, [], [1])], truth)


@given(st.lists(st.lists(st.floats(1e9, 1e9 + 60), min_size=1, max_size=20), max_size=5))
def test_no_token_is_lost_in_the_rate(lists: list[list[float]]):
    streams = [stream(*sorted(times)) for times in lists]
    middles, rates = token_rate(streams, 0.5)
    assert len(middles) == len(rates)
    assert sum(rates) * 0.5 == pytest.approx(sum(map(len, lists)))


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20, unique=True), st.floats(-5, 105))
def test_the_longest_gap_is_one_of_the_gaps(times: list[float], at: float):
    gaps = token_gaps([stream(*sorted(times))])
    assert longest_between(gaps, at, at) in [0.0, *(gaps[:, 1] - gaps[:, 0]).tolist()]
    assert longest_between(gaps, -1.0, 101.0) == (gaps[:, 1] - gaps[:, 0]).max()


def test_figures_are_flat():
    run = [stream(1.0, 1.1, 1.3), stream(2.0, error="HTTP 503", ended=4.0)]
    found = figures(run, [stream(0.0, 0.1, 0.2)])
    assert (found["sent"], found["completed"], found["failed"]) == (2, 1, 1)
    assert found["gap_max_s"] == 2.0
    assert found["wrong_tokens"] == 0
    assert found["ttft_p50_s"] == 0.1
    assert all(isinstance(value, int | float) for value in found.values())
