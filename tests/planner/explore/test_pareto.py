"""The Pareto front: what is on it, and that nothing else should be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from planner.explore.pareto import front, front_indices
from planner.explore.points import Group, Mode, Point

pairs = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=60)


def make(tpot: float, tokens_per_s: float) -> Point:
    group = Group("worker", 1, 1, 1, 1, 1, 4, 0.0, 0.0)
    return Point(Mode.AGGREGATED, (group,), 1, 1.0, 0.1, tpot, tokens_per_s)


def test_by_hand() -> None:
    fast, middle, slow = make(0.01, 100.0), make(0.02, 400.0), make(0.04, 900.0)
    beaten = [make(0.02, 300.0), make(0.05, 900.0)]
    assert front([middle, *beaten, slow, fast, middle]) == (slow, middle, fast)
    assert front([]) == ()


@given(pairs)
def test_front_by_definition(values: list[tuple[int, int]]) -> None:
    users = np.array([u for u, _ in values], float)
    rates = np.array([r for _, r in values], float)
    kept = front_indices(users, rates)

    def beaten(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return other != one and other[0] >= one[0] and other[1] >= one[1]

    expected = {one for one in values if not any(beaten(one, other) for other in values)}
    assert {values[i] for i in kept} == expected
    assert len(kept) == len(expected)
    assert [values[i][0] for i in kept] == sorted(u for u, _ in expected)
    assert [values[i][1] for i in kept] == sorted((r for _, r in expected), reverse=True)


def test_what_is_not_a_number_is_left_out() -> None:
    users, rates = np.array([1.0, np.nan, np.inf, 2.0]), np.array([5.0, 9.0, 9.0, np.nan])
    assert front_indices(users, rates) == [0]
