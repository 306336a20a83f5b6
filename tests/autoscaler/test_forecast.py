"""Series of a stream, and their forecasts."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.forecast import MOST_GROWTH, Series, forecast


def test_a_series_holds_means_of_periods_that_are_over():
    series = Series(10.0, keep=3)
    ended = [series.add(now, now) for now in (0.0, 5.0, 10.0, 19.0, 25.0, 35.0, 45.0)]
    assert ended == [False, False, True, False, True, True, True]
    assert list(series.values) == [14.5, 25.0, 35.0]


def test_gaps_are_filled_and_leaps_start_anew():
    series = Series(10.0, keep=20)
    series.add(0.0, 4.0)
    series.add(31.0, 8.0)
    assert list(series.values) == [4.0, 4.0, 4.0]
    series.add(1000.0, 8.0)
    assert list(series.values) == []
    series.add(1010.0, 6.0)
    series.add(900.0, 6.0)
    assert list(series.values) == [], "a clock that ran backwards"


def test_what_was_not_measured_is_left_out():
    series = Series(10.0, keep=20)
    assert not series.add(0.0, math.nan)
    assert not series.add(math.nan, 1.0)
    series.add(5.0, 2.0)
    series.add(12.0, 3.0)
    assert list(series.values) == [2.0]


def test_too_little_says_nothing_and_a_constant_says_itself():
    assert math.isnan(forecast([1.0, 2.0, 3.0], 2))
    assert forecast([3.0] * 20, 5, quantile=0.9) == 3.0
    assert forecast([0.0] * 20, 5) == 0.0


def test_a_rise_goes_on_for_a_while():
    rising = [float(value) for value in range(10, 40)]
    assert 39.0 < forecast(rising, 4) < 45.0


def test_a_higher_quantile_is_more_careful():
    noise = np.random.default_rng(1).normal(50.0, 5.0, 100).clip(0.0).tolist()
    middle, high = forecast(noise, 3), forecast(noise, 3, quantile=0.9)
    assert middle == pytest.approx(50.0, abs=4.0)
    assert middle + 4.0 < high < middle + 12.0


def test_a_season_is_foreseen():
    day = [10.0 + 8.0 * math.sin(2 * math.pi * hour / 24) for hour in range(24)]
    history = (day * 3)[: 2 * 24 + 12]  # ends at noon of the third, when it turns down to up again
    ahead = day[12:16]
    assert forecast(history, 4, season=24) == pytest.approx(max(ahead), rel=0.05)
    morning = (day * 3)[: 2 * 24 + 1]
    assert forecast(morning, 6, season=24) == pytest.approx(18.0, rel=0.05)


@settings(max_examples=30)
@given(
    st.lists(st.floats(0.0, 1e6), min_size=8, max_size=60),
    st.integers(1, 10),
    st.sampled_from([0, 1, 4, 12]),
    st.sampled_from([0.5, 0.8, 0.99]),
)
def test_it_is_finite_and_sane_or_unknown(
    values: list[float], steps: int, season: int, quantile: float
):
    ahead = forecast(values, steps, season, quantile)
    assert math.isnan(ahead) or 0.0 <= ahead <= MOST_GROWTH * max(values)


def test_a_controller_without_forecasts_does_not_load_the_library():
    code = (
        "import sys; from autoscaler import registry; registry.make('predictive');"
        "sys.exit(any(name in sys.modules for name in ('statsmodels', 'pandas')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
