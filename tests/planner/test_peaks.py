"""Tops of curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.peaks import peak_of, value_at


@given(st.floats(2, 30), st.floats(0.05, 3))
def test_finds_the_top_of_a_parabola(top: float, bend: float) -> None:
    ratios = np.geomspace(1, 60, 80)
    peak = peak_of(ratios, 5 - bend * np.log(ratios / top) ** 2)
    assert peak.inside
    assert peak.ratio == pytest.approx(top, rel=1e-6)
    assert peak.value == pytest.approx(5.0)


def test_a_kink_is_found_within_the_spacing() -> None:
    ratios = np.arange(10, 61) / 3
    for kink in (8.0, 8.17, 10.3):
        values = 1 + np.minimum(0.1 * np.log(ratios / kink), -0.25 * np.log(ratios / kink))
        assert peak_of(ratios, values).ratio == pytest.approx(kink, rel=0.03)


def test_little_noise_moves_it_little() -> None:
    rng = np.random.default_rng(0)
    ratios = np.geomspace(3, 30, 64)
    noise = 2e-4 * rng.standard_normal(len(ratios))
    peak = peak_of(ratios, 1 - 0.1 * np.log(ratios / 9) ** 2 + noise)
    assert peak.ratio == pytest.approx(9, rel=0.12)


def test_a_top_at_the_end_is_told() -> None:
    assert not peak_of([1, 2, 3], [1, 2, 3]).inside
    assert peak_of([1, 2, 3], [1, 2, 3]).ratio == 3
    assert not peak_of([1, 2, 3], [3, 2, 1]).inside
    assert peak_of([4], [1]).ratio == 4


def test_refuses_what_does_not_pair() -> None:
    with pytest.raises(PlannerError):
        peak_of([1, 2], [1])
    with pytest.raises(PlannerError):
        peak_of([], [])


def test_between_points() -> None:
    assert value_at([1, 4], [0, 2], 2.0) == pytest.approx(1.0)
    assert value_at([1, 4], [0, 2], 9.0) == 2.0
