"""Tables that ask as little as they can."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.explore.kernels.adaptive import Adaptive


class Counted:
    def __init__(self, function):
        self.function, self.asked = function, []

    def __call__(self, x: int) -> float:
        self.asked.append(x)
        return self.function(x)


def test_a_line_is_exact_and_asked_for_rarely() -> None:
    line = Counted(lambda x: 3.0 + 0.5 * x)
    table = Adaptive(line)
    x = np.arange(1.0, 1000.0, 0.25)
    assert table(x) == pytest.approx(3.0 + 0.5 * x)
    assert len(line.asked) < 30


def test_bends_that_are_given_are_exact() -> None:
    def kinked(x: int) -> float:
        return 10.0 + max(0, x - 37)

    x = np.array([36.0, 37.0, 38.0, 50.0])
    assert Adaptive(kinked, [37])(x) == pytest.approx([10.0, 10.0, 11.0, 23.0])


def test_grows_when_asked_for_more_and_never_asks_twice() -> None:
    square = Counted(lambda x: float(x * x))
    table = Adaptive(square)
    assert table(np.array([8.0])) == pytest.approx([64.0])
    few = len(square.asked)
    assert table(np.array([4096.0])) == pytest.approx([4096.0**2])
    assert table(np.array([8.0])) == pytest.approx([64.0])
    assert len(square.asked) > few
    assert len(square.asked) == len(set(square.asked))


def test_below_one_is_one_and_nothing_is_nothing() -> None:
    table = Adaptive(lambda x: 7.0 * x)
    assert table(np.array([0.0, 0.5, 1.0])) == pytest.approx([7.0, 7.0, 7.0])
    assert table(np.zeros((0, 3))).shape == (0, 3)


def test_shape_is_kept() -> None:
    assert Adaptive(lambda x: float(x))(np.ones((2, 3, 4))).shape == (2, 3, 4)


def test_errors_are_passed_on() -> None:
    def refuses(x: int) -> float:
        raise KeyError(x)

    with pytest.raises(KeyError):
        Adaptive(refuses)(np.array([5.0]))


@given(
    fixed=st.floats(0.01, 10),
    slope=st.floats(0.0, 1.0),
    power=st.floats(0.2, 2.0),
    x=st.integers(1, 5000),
)
def test_smooth_functions_are_met(fixed: float, slope: float, power: float, x: int) -> None:
    def smooth(at: float) -> float:
        return fixed + slope * at**power

    found = Adaptive(lambda at: smooth(at))(np.array([float(x)]))
    assert found[0] == pytest.approx(smooth(x), rel=0.02)
