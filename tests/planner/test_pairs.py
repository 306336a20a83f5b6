"""Workloads: what they draw has the moments they state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.lengths import Empirical, Fixed, Geometric, LogNormal
from planner.moments import moments_of
from planner.pairs import Independent, Joint, LogNormalJoint, Workload

DRAWS = 100_000

lognormals = st.builds(LogNormal, st.floats(20, 5000), st.floats(0.1, 0.6))
outputs = st.one_of(
    st.integers(1, 2000).map(Fixed),
    st.floats(1, 2000).map(Geometric),
    lognormals,
    st.lists(st.integers(1, 2000), min_size=1, max_size=4).map(lambda x: Empirical(tuple(x))),
)
prompts = st.one_of(st.integers(0, 5000).map(Fixed), outputs)
workloads: st.SearchStrategy[Workload] = st.one_of(
    st.builds(Independent, prompts, outputs),
    st.builds(LogNormalJoint, lognormals, lognormals, st.floats(-1, 1)),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 2000)), min_size=1, max_size=9).map(
        lambda pairs: Joint(*np.array(pairs).T)
    ),
)


@settings(max_examples=40)
@given(workloads, st.integers(0, 2**32))
def test_sampled_moments_are_the_stated_ones(workload: Workload, seed: int) -> None:
    prompt, output = workload.sample(np.random.default_rng(seed), DRAWS)
    assert prompt.shape == output.shape == (DRAWS,)
    assert prompt.min() >= 0 and output.min() >= 1
    stated, drawn = workload.moments(), moments_of(prompt, output)
    assert drawn.theta == pytest.approx(stated.theta, rel=0.05)
    # Second moments agree to a few per cent of theta^2, below which nu^2 may be lost in noise.
    assert drawn.nu2 == pytest.approx(stated.nu2, rel=0.15, abs=1e-3 * stated.theta**2 + 1e-6)
    assert prompt.mean() == pytest.approx(workload.mean_prompt, rel=0.03, abs=1e-9)
    assert output.mean() == pytest.approx(workload.mean_output, rel=0.03)
    assert (stated.prompt_mean, stated.output_mean) == pytest.approx(
        (workload.mean_prompt, workload.mean_output)
    )


@given(workloads, st.integers(0, 2**32))
def test_draws_repeat_with_the_seed(workload: Workload, seed: int) -> None:
    one, other = (workload.sample(np.random.default_rng(seed), 20) for _ in range(2))
    assert (np.array(one) == np.array(other)).all()


@settings(max_examples=50)
@given(lognormals, lognormals)
def test_uncorrelated_lognormals_are_independent_ones(prompt: LogNormal, output: LogNormal) -> None:
    together = LogNormalJoint(prompt, output, 0.0).moments()
    apart = Independent(prompt, output).moments()
    assert together.theta == pytest.approx(apart.theta)
    assert together.nu2 == pytest.approx(apart.nu2)


@settings(max_examples=50)
@given(lognormals, lognormals, st.floats(-1, 1), st.floats(-1, 1))
def test_correlation_raises_the_load(
    prompt: LogNormal, output: LogNormal, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    loads = [LogNormalJoint(prompt, output, r).moments().theta for r in (low, high)]
    assert loads[0] <= loads[1] * (1 + 1e-9)


def test_correlation_is_that_of_the_draws() -> None:
    joint = LogNormalJoint(LogNormal(1155, 1.2), LogNormal(211, 0.9), 0.3)
    prompt, output = joint.sample(np.random.default_rng(0), DRAWS)
    assert np.corrcoef(np.log(prompt), np.log(output))[0, 1] == pytest.approx(0.3, abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), min_size=1, max_size=20))
def test_observed_requests_are_drawn_whole_and_replayed_in_order(
    pairs: list[tuple[int, int]],
) -> None:
    joint = Joint(*np.array(pairs).T)
    assert len(joint) == len(pairs)
    assert list(joint.replay()) == pairs
    drawn = zip(*(x.tolist() for x in joint.sample(np.random.default_rng(0), 50)), strict=True)
    assert set(drawn) <= set(pairs)


def test_observed_requests_cannot_change_behind_their_moments() -> None:
    prompt = np.array([1, 2, 3])
    joint = Joint(prompt, np.array([4, 5, 6]))
    before = joint.moments()
    prompt[:] = 100  # ours to change: the workload has a copy
    assert joint.prompt.tolist() == [1, 2, 3]
    assert joint.moments() is before
    with pytest.raises(ValueError, match="read-only"):
        joint.prompt[0] = 9


def test_names_say_what_it_is() -> None:
    assert Independent(Fixed(100), Geometric(500)).name == "fixed:100,geometric:500"
    assert Independent(Fixed(100), Geometric(500), name="base").name == "base"
    joint = LogNormalJoint(LogNormal(9, 1), LogNormal(9, 1), 0.3)
    assert joint.name == "lognormal:9:1,lognormal:9:1,correlation:0.3"


@pytest.mark.parametrize("reuse", [-0.1, 1.1, float("nan")])
def test_refused_reuse(reuse: float) -> None:
    length = LogNormal(9, 1)
    with pytest.raises(PlannerError, match="reuse is"):
        Independent(length, length, reuse=reuse)
    with pytest.raises(PlannerError, match="reuse is"):
        LogNormalJoint(length, length, 0.0, reuse=reuse)
    with pytest.raises(PlannerError, match="reuse is"):
        Joint(np.array([1]), np.array([1]), reuse=reuse)


def test_refused_workloads() -> None:
    with pytest.raises(PlannerError, match="fixed:0 can be 0: a request makes one token"):
        Independent(Fixed(10), Fixed(0))
    with pytest.raises(PlannerError, match="correlation is 2"):
        LogNormalJoint(LogNormal(9, 1), LogNormal(9, 1), 2)
    with pytest.raises(PlannerError, match="output lengths hold 0"):
        Joint(np.array([1]), np.array([0]))
