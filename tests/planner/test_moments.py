"""The load of a slot: formulas against walking through every step of every request."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.lengths import Fixed, Geometric
from planner.moments import GROUPS, Moments, independent_moments, moments_of
from planner.pairs import LogNormalJoint
from planner.workload import LogNormal

pairs = st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 60)), min_size=1, max_size=40)


def loads_by_walking(requests: list[tuple[int, int]]) -> np.ndarray:
    """The token load of a slot in each step, over one run through the requests."""
    return np.array([prompt + k for prompt, output in requests for k in range(output)], dtype=float)


@given(pairs)
def test_estimates_are_those_of_walking_through_the_steps(requests: list[tuple[int, int]]) -> None:
    prompt, output = np.array(requests).T
    loads = loads_by_walking(requests)
    found = moments_of(prompt, output)
    assert found.theta == pytest.approx(loads.mean())
    assert found.nu2 == pytest.approx(loads.var(), abs=1e-6)
    assert found.prompt_mean == pytest.approx(prompt.mean())
    assert found.output_mean == pytest.approx(output.mean())
    assert found.samples == len(requests) and not found.exact


@settings(max_examples=50)
@given(pairs, st.floats(0.5, 0.99), st.integers(0, 1000))
def test_intervals_are_ordered_and_repeat_with_the_seed(
    requests: list[tuple[int, int]], confidence: float, seed: int
) -> None:
    prompt, output = np.array(requests).T
    found = moments_of(prompt, output, confidence, seed)
    assert found == moments_of(prompt, output, confidence, seed)
    if len(requests) == 1:
        assert found.theta_low is found.theta_high is found.nu2_low is found.nu2_high is None
        return
    assert found.theta_low is not None and found.theta_high is not None
    assert found.nu2_low is not None and found.nu2_high is not None
    assert 0 <= found.theta_low <= found.theta_high
    assert 0 <= found.nu2_low <= found.nu2_high


@settings(max_examples=50)
@given(pairs, st.randoms())
def test_order_of_requests_does_not_matter(requests: list[tuple[int, int]], random) -> None:
    shuffled = random.sample(requests, len(requests))
    one, other = (moments_of(*np.array(some).T) for some in (requests, shuffled))
    assert one.theta == pytest.approx(other.theta)
    assert one.nu2 == pytest.approx(other.nu2, abs=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 10**4))
def test_equal_requests_leave_no_doubt(prompt: int, output: int) -> None:
    found = moments_of([prompt] * 5, [output] * 5)
    assert found.theta == pytest.approx(prompt + (output - 1) / 2)
    assert found.nu2 == pytest.approx((output**2 - 1) / 12)  # uniform over the steps
    assert found.theta_low == found.theta_high == pytest.approx(found.theta)
    assert found.nu2_low == found.nu2_high == pytest.approx(found.nu2)
    exact = independent_moments(Fixed(prompt).raw_moments(), Fixed(output).raw_moments())
    assert exact.theta == pytest.approx(found.theta)
    assert exact.nu2 == pytest.approx(found.nu2, abs=1e-9 * (1 + found.theta**2))


@given(st.integers(0, 10**5), st.floats(1, 1e5))
def test_geometric_outputs_forget_how_far_they_are(prompt: int, mean: float) -> None:
    """theta = mu_P + (1-p)/p, and the age in a step is geometric: variance (1-p)/p^2."""
    found = independent_moments(Fixed(prompt).raw_moments(), Geometric(mean).raw_moments())
    assert found.theta == pytest.approx(prompt + mean - 1)
    assert found.nu2 == pytest.approx(mean * (mean - 1), abs=1e-9 * (1 + found.theta**2))
    assert found.naive == pytest.approx(prompt + mean)
    assert found.exact


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = LogNormalJoint(LogNormal(1000, 0.6), LogNormal(200, 0.6), 0.3)
    exact = truth.moments()
    runs, theta, nu2 = 80, 0, 0
    for seed in range(runs):
        found = moments_of(*truth.sample(np.random.default_rng(seed), 2000), confidence=0.9)
        assert found.theta_low is not None and found.theta_high is not None
        assert found.nu2_low is not None and found.nu2_high is not None
        theta += found.theta_low <= exact.theta <= found.theta_high
        nu2 += found.nu2_low <= exact.nu2 <= found.nu2_high
    assert 0.8 < theta / runs < 0.98
    assert 0.7 < nu2 / runs < 0.98


def test_bursts_of_like_requests_widen_the_interval() -> None:
    """What looks like many requests is few independent ones when neighbours are alike."""
    rng = np.random.default_rng(3)
    kinds = rng.integers(100, 5000, size=GROUPS)
    alike = np.repeat(kinds, 50)
    mixed = rng.permutation(alike)
    output = np.full(len(alike), 10)
    widths = []
    for prompt in (alike, mixed):
        found = moments_of(prompt, output)
        assert found.theta_low is not None and found.theta_high is not None
        widths.append(found.theta_high - found.theta_low)
    assert widths[0] > 4 * widths[1]  # about sqrt(50) = 7


def test_long_traces_cost_little() -> None:
    rng = np.random.default_rng(0)
    prompt, output = rng.integers(1, 10_000, 1_000_000), rng.integers(1, 500, 1_000_000)
    moments_of(prompt[:10], output[:10])  # imports
    start = time.process_time()
    moments_of(prompt, output)
    assert time.process_time() - start < 5  # 0.3 s where nothing else runs


def test_large_lengths_keep_their_variance() -> None:
    """m2 - theta^2 would lose all digits here."""
    found = moments_of([10**9, 10**9 - 2], [1, 1])
    assert found.theta == 10**9 - 1
    assert found.nu2 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prompt", "output", "says"),
    [
        ([], [], "no requests"),
        ([1, 2], [1], r"shape \(2,\) and output lengths of shape \(1,\)"),
        ([[1]], [[1]], r"shape \(1, 1\)"),
        ([1, 2], [1, 0], "output lengths hold 0: expected whole numbers of tokens from 1"),
        ([1, -2], [1, 1], "prompt lengths hold -2: expected whole numbers of tokens from 0"),
        ([1, 2.5], [1, 1], "prompt lengths hold 2.5"),
        ([1, float("nan")], [1, 1], "prompt lengths hold nan"),
        ([1, 1], [1, 1e300], r"output lengths hold 1e\+300"),
        (["a"], [1], "prompt lengths are of type <U1"),
    ],
)
def test_refused_requests(prompt: list, output: list, says: str) -> None:
    with pytest.raises(PlannerError, match=says):
        moments_of(prompt, output)


@pytest.mark.parametrize("confidence", [0, 1, -1, float("nan")])
def test_refused_confidence(confidence: float) -> None:
    with pytest.raises(PlannerError, match="confidence is"):
        moments_of([1], [1], confidence)


def test_moments_by_hand() -> None:
    moments = Moments(theta=599, nu2=400.0, prompt_mean=100, output_mean=500)
    assert moments.nu == 20
    assert moments.naive == 600
    with pytest.raises(PlannerError, match="nu2 of a workload is -1"):
        Moments(1, -1, 1, 1)
    with pytest.raises(PlannerError, match="theta of a workload is nan"):
        Moments(float("nan"), 1, 1, 1)
    with pytest.raises(PlannerError, match="mean output length is 0"):
        independent_moments((1, 1, 1), (0, 0, 0))
