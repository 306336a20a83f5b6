"""Boarding: every frame leaves once, nobody waits, only frames that may share a kernel do."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from actors.boarding import board


@dataclass(frozen=True)
class Header:
    layer: int
    tokens: int
    dense: bool


@dataclass(frozen=True)
class Frame:
    number: int
    header: Header


def frames(*headers: tuple[int, int, bool]) -> list[Frame]:
    return [Frame(i, Header(*header)) for i, header in enumerate(headers)]


def numbers(rides: list[list[Frame]]) -> list[list[int]]:
    return [[frame.number for frame in ride] for ride in rides]


def test_small_frames_of_a_layer_ride_together():
    waiting = frames((3, 8, False), (4, 8, False), (3, 8, False), (3, 8, False))
    assert numbers(board(waiting, 64)) == [[0, 2, 3], [1]]


def test_a_large_frame_rides_alone_and_does_not_split_the_others():
    waiting = frames((1, 8, False), (1, 500, False), (1, 8, False))
    assert numbers(board(waiting, 64)) == [[0, 2], [1]]


def test_a_full_ride_leaves_and_the_next_begins():
    waiting = frames((1, 40, True), (1, 40, True), (1, 20, True))
    assert numbers(board(waiting, 64)) == [[0], [1, 2]]


def test_layouts_are_not_mixed():
    assert numbers(board(frames((1, 8, True), (1, 8, False)), 64)) == [[0], [1]]


def test_nothing_waits_for_nothing():
    assert board([], 64) == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90), st.booleans()), max_size=20),
    st.integers(1, 128),
)
def test_rides_keep_every_promise(headers, merge_tokens):
    waiting = frames(*headers)
    rides = board(waiting, merge_tokens)
    assert sorted(n for ride in numbers(rides) for n in ride) == list(range(len(waiting)))
    assert [ride[0].number for ride in rides] == sorted(ride[0].number for ride in rides)
    for ride in rides:
        assert [f.number for f in ride] == sorted(f.number for f in ride)
        assert len({(f.header.layer, f.header.dense) for f in ride}) == 1
        assert len(ride) == 1 or sum(f.header.tokens for f in ride) <= merge_tokens
