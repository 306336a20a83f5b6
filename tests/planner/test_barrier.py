"""The expected step of the slowest worker, against the paper's integral and against draws."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import log_ndtr

from planner.barrier import Slowest, Z, distinct_holders, expected_step
from planner.errors import PlannerError


def papers_integral(floor: float, mean: float, sigma: float, workers: float) -> float:
    """G + sigma * integral_{(G-mu)/sigma}^inf (1 - Phi(x)^r) dx (arXiv 2601.21351 v3)."""
    low = (floor - mean) / sigma

    def tail(x: float) -> float:
        return -math.expm1(workers * float(log_ndtr(x)))

    # below -12 the integrand is 1, above 12 it is 0
    flat = max(0.0, -12.0 - low)
    start = max(low, -12.0)
    area = quad(tail, start, 12.0, epsabs=1e-12, limit=400)[0] if start < 12.0 else 0.0
    return floor + sigma * (flat + area)


def slowest(floor: float, times: np.ndarray, workers: list[float]) -> np.ndarray:
    count = np.array(workers)
    return expected_step(np.full(len(workers), floor), [Slowest(times, count)])


@settings(max_examples=60, deadline=None)
@given(
    floor=st.floats(0, 400),
    mean=st.floats(50, 400),
    sigma=st.floats(0.5, 60),
    workers=st.floats(1, 500),
)
def test_is_the_papers_integral(floor: float, mean: float, sigma: float, workers: float) -> None:
    got = slowest(floor, mean + sigma * Z, [workers])[0]
    assert got == pytest.approx(papers_integral(floor, mean, sigma, workers), abs=5e-4 * sigma)


def test_is_the_mean_of_draws() -> None:
    rng = np.random.default_rng(0)
    largest = rng.standard_normal((40_000, 12)).max(axis=1)
    assert slowest(-99.0, Z, [12.0])[0] == pytest.approx(largest.mean(), abs=0.02)
    other = rng.standard_normal((40_000, 3)).max(axis=1)
    both = expected_step(
        np.array([0.9]), [Slowest(Z, np.array([12.0])), Slowest(1 + 0.5 * Z, np.array([3.0]))]
    )
    expected = np.maximum(np.maximum(largest, 1 + 0.5 * other), 0.9).mean()
    assert both[0] == pytest.approx(expected, abs=0.02)


def test_one_worker_is_the_mean_and_fewer_count_as_one() -> None:
    assert slowest(-99.0, 7 + 3 * Z, [1.0, 0.2]) == pytest.approx([7.0, 7.0], abs=1e-3)


def test_more_workers_are_never_faster() -> None:
    assert np.all(np.diff(slowest(-99.0, Z, [1.0, 2.0, 3.0, 50.0, 1e5])) > 0)


def test_what_does_not_vary_is_a_floor() -> None:
    flat = np.full(len(Z), 5.0)
    assert slowest(3.0, flat, [4.0]) == pytest.approx([5.0])
    assert slowest(8.0, flat, [4.0]) == pytest.approx([8.0])
    assert slowest(99.0, Z, [4.0]) == pytest.approx([99.0])


@pytest.mark.parametrize(
    ("ffn", "top_k", "experts", "holders"),
    [
        (1, 8, None, 1.0),
        (4, 1, None, 1.0),
        (2, 2, None, 1.5),
        (2, 2, 4, 2 * (1 - (2 / 4) * (1 / 3))),
        (4, 8, 8, 4.0),
    ],
)
def test_distinct_holders(ffn: float, top_k: int, experts: int | None, holders: float) -> None:
    assert distinct_holders(ffn, top_k, experts) == pytest.approx(holders)


def test_distinct_holders_of_draws() -> None:
    rng = np.random.default_rng(1)
    chosen = np.array([rng.choice(32, 4, replace=False) for _ in range(20_000)])
    seen = np.mean([len(set(row)) for row in (chosen // 8).tolist()])
    assert distinct_holders(4, 4, 32) == pytest.approx(seen, rel=0.01)


@pytest.mark.parametrize("given_", [(0.5, 8, None), (4, 0, None), (4, 8, 4), (16, 2, 8)])
def test_refuses_what_cannot_be(given_: tuple[float, int, int | None]) -> None:
    with pytest.raises(PlannerError):
        distinct_holders(*given_)
