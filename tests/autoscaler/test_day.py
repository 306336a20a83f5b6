"""Days made of an hour: what stays real, what is assumed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.day import CASES, DAY, PEAK_AT, TROUGH, make_day, shape
from autoscaler.limits import Counts
from planner.errors import PlannerError
from planner.traces import Trace


def hour(count: int = 400, seed: int = 0, blocks: bool = False) -> Trace:
    """An hour with a burst in the middle."""
    rng = np.random.default_rng(seed)
    calm = rng.uniform(0, 3600, count)
    burst = rng.uniform(1800, 1860, count // 4)
    arrival = np.sort(np.concatenate((calm, burst)))
    size = len(arrival)
    ids = tuple((i % 7, 100 + i) for i in range(size)) if blocks else None
    return Trace(
        arrival - arrival[0],
        rng.integers(600, 1000, size),
        np.arange(1, size + 1),
        blocks=ids,
    )


def test_the_night_is_the_trough_and_the_afternoon_the_peak() -> None:
    assert shape(np.array([PEAK_AT])) == pytest.approx(1.0)
    assert shape(np.array([PEAK_AT - DAY / 2])) == pytest.approx(TROUGH)
    over = shape(np.linspace(0, DAY, 2000))
    assert over.min() >= TROUGH - 1e-9
    assert 0.55 < over.mean() < 0.65


def test_the_mean_rate_follows_the_shape() -> None:
    day = make_day(hour(), peak=0.5).trace
    counts = np.histogram(day.arrival, bins=np.arange(25) * 3600.0)[0]
    expected = 0.5 * 3600 * shape((np.arange(24) + 0.5) * 3600)
    assert len(day) == pytest.approx(expected.sum(), rel=0.05)
    # An hour of the recording is not exactly an hour of the day, and it has a burst.
    assert np.corrcoef(counts, expected)[0, 1] > 0.9


@settings(max_examples=20, deadline=None)
@given(st.floats(0.2, 3.0), st.integers(0, 5), st.floats(0.5, 24.0))
def test_a_day_is_a_trace_of_the_recorded_requests(peak: float, seed: int, hours: float) -> None:
    recorded = hour()
    day = make_day(recorded, peak, seed=seed, hours=hours)
    assert day.trace.arrival[0] >= 0
    assert day.trace.arrival[-1] <= hours * 3600 + 1e-6
    # Outputs are 1, 2, 3, ... in the recording: whoever comes next there comes next here.
    follows = np.diff(day.trace.output) % len(recorded)
    laps = (follows != 1).sum()
    assert laps <= 2 + peak / recorded.rate * hours
    again = make_day(recorded, peak, seed=seed, hours=hours)
    assert np.array_equal(again.trace.arrival, day.trace.arrival)


def test_bursts_stay_bursts() -> None:
    recorded = hour()
    day = make_day(recorded, recorded.rate).trace
    minute = np.histogram(day.arrival, bins=np.arange(0, DAY, 60.0))[0]
    assert minute.max() > 5 * minute.mean()


def test_prefixes_are_found_as_in_the_recording() -> None:
    recorded = hour(blocks=True)
    day = make_day(recorded, 0.5)
    assert len(day.cached) == len(day.trace)
    assert 0 < day.cached.sum() < day.trace.prompt.sum()
    assert (day.cached < day.trace.prompt).all()
    assert not make_day(hour(), 0.5).cached.any()


def test_what_is_assumed_is_said() -> None:
    assert "assumed" in make_day(hour(), 0.5).note


@pytest.mark.parametrize(("peak", "hours"), [(0.0, 24.0), (-1.0, 24.0), (1.0, 0.0), (1.0, 25.0)])
def test_no_day_without_a_rate_or_beyond_midnight(peak: float, hours: float) -> None:
    with pytest.raises(PlannerError, match="peak is"):
        make_day(hour(), peak, hours=hours)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_makes_a_scenario(case) -> None:
    scenario = case.scenario(make_day(hour(), 0.5, hours=1.0), 2, 1)
    assert scenario.cluster.latencies.unit == "s"
    assert scenario.system.slots == case.slots
    assert scenario.limits.allow(Counts(2, 1))
