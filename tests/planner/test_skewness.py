"""Skewness of a slot's context."""

import numpy as np
import pytest

from planner.lockstep import lane_loads
from planner.skewness import load_skewness
from planner.workload import Fixed, Geometric, Independent, Joint, LogNormal


def test_known_cases() -> None:
    # the age of a geometric output is geometric again: 2 in the limit of long ones
    assert load_skewness(Independent(Fixed(100), Geometric(500))) == pytest.approx(2.0, abs=0.1)
    # that of a fixed one is uniform: symmetric
    assert load_skewness(Independent(Fixed(100), Fixed(500))) == pytest.approx(0.0, abs=1e-9)
    assert load_skewness(Independent(Fixed(100), Fixed(1))) == 0.0


def test_counts_step_by_step() -> None:
    load = Joint(np.array([10, 50]), np.array([3, 1]))
    context = np.array([10, 11, 12, 50.0])
    expected = np.mean((context - context.mean()) ** 3) / context.std() ** 3
    assert load_skewness(load) == pytest.approx(expected, rel=0.02)


def test_is_what_lanes_show() -> None:
    load = Independent(LogNormal(300, 0.5), LogNormal(40, 0.5))
    drawn = lane_loads(load, 4, 100, 2, 800, seed=0)
    found = np.mean((drawn - drawn.mean()) ** 3) / drawn.std() ** 3
    assert load_skewness(load) / 2 == pytest.approx(found, rel=0.15)
