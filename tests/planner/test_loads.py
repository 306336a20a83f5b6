"""What is drawn for a simulation: repeatable, in blocks, and distributed as asked."""

from itertools import islice

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.loads import Closed, Poisson, draws, poisson_arrivals, stationary_draws
from planner.workload import Fixed, Geometric, Independent

LOAD = Independent(Fixed(100), Geometric(50), reuse=0.25)


def test_a_longer_run_begins_like_a_shorter_one():
    short = list(draws(LOAD, 3, 7, 500))
    long = list(islice(draws(LOAD, 3, 7, None), 10_000))

    assert long[:500] == short
    assert list(draws(LOAD, 3, 8, 500)) != short
    assert list(draws(LOAD, 4, 7, 500)) != short
    assert short[0].cached == 25


def test_a_stationary_start_is_biased_to_long_requests_at_any_age():
    found = stationary_draws(LOAD, 0, 0, 20_000)

    # Size-biased geometric: E[D^2] / E[D] = 2 * mean - 1; the age's mean is (that - 1) / 2.
    assert np.mean([d.output for d in found]) == pytest.approx(99, rel=0.05)
    assert np.mean([d.age for d in found]) == pytest.approx(49, rel=0.05)
    assert all(0 <= d.age < d.output for d in found)


def test_poisson_gaps_are_exponential():
    times = [a.time for a in poisson_arrivals(Poisson(LOAD, 4.0, 20_000), 1)]
    gaps = np.diff([0.0, *times])

    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)


def test_arrivals_end_where_the_rate_does():
    load = Poisson(LOAD, [(0.0, 10.0), (5.0, 0.0)], 10_000)

    times = [a.time for a in poisson_arrivals(load, 1)]

    assert 30 <= len(times) <= 75
    assert max(times) <= 5.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Closed(LOAD, 0), "0 requests"),
        (lambda: Poisson(LOAD, -1.0, 5), "rates"),
        (lambda: Poisson(LOAD, 0.0, 5), "rates"),
        (lambda: Poisson(LOAD, float("nan"), 5), "rates"),
        (lambda: Poisson(LOAD, [(1.0, 2.0)], 5), "first must be 0"),
        (lambda: Poisson(LOAD, [], 5), "first must be 0"),
    ],
)
def test_loads_that_cannot_be_are_refused(make, words):
    with pytest.raises(PlannerError, match=words):
        make()


def test_lengths_that_cannot_be_are_refused():
    class Bad:
        reuse = 0.0

        def sample(self, rng, n):
            return np.zeros(n, dtype=int), np.zeros(n, dtype=int)

    with pytest.raises(PlannerError, match="output of 0"):
        next(draws(Bad(), 0, 0, 1))
