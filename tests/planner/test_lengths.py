"""Distributions of one length: what they draw has the moments they state."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.lengths import (
    MAX_LENGTH,
    Empirical,
    Fixed,
    Geometric,
    LogNormal,
    Marginal,
    parse_lengths,
    rounded_lognormal_moments,
)

DRAWS = 20_000

weights = st.floats(0.01, 100)
empirical = st.lists(st.tuples(st.integers(0, 10**6), weights), min_size=1, max_size=6).flatmap(
    lambda pairs: st.sampled_from(
        [
            Empirical(tuple(value for value, _ in pairs)),
            Empirical(tuple(value for value, _ in pairs), tuple(weight for _, weight in pairs)),
        ]
    )
)
marginals: st.SearchStrategy[Marginal] = st.one_of(
    st.integers(0, 10**6).map(Fixed),
    st.floats(1, 1e6).map(Geometric),
    st.builds(LogNormal, st.floats(1, 1e5), st.floats(0.05, 1.0)),
    empirical,
)


def standard_error(x: np.ndarray) -> float:
    return float(x.std() / math.sqrt(len(x)))


@settings(max_examples=60)
@given(marginals, st.integers(0, 2**32))
def test_sampled_moments_are_the_stated_ones(lengths: Marginal, seed: int) -> None:
    x = lengths.sample(np.random.default_rng(seed), DRAWS).astype(float)
    # The third moment of a skewed sample tells little, so it is checked against a sum below.
    for power, stated in zip((1, 2), lengths.raw_moments(), strict=False):
        drawn = x**power
        # Slack for the skew that a standard error does not see.
        slack = 6 * standard_error(drawn) + 0.01 * stated
        assert drawn.mean() == pytest.approx(stated, abs=slack)


@settings(max_examples=60)
@given(marginals, st.integers(0, 50), st.integers(0, 2**32))
def test_draws_are_whole_lengths_and_repeat_with_the_seed(
    lengths: Marginal, n: int, seed: int
) -> None:
    x = lengths.sample(np.random.default_rng(seed), n)
    assert x.dtype == np.int64 and x.shape == (n,)
    assert (x >= lengths.smallest).all()
    assert (x == lengths.sample(np.random.default_rng(seed), n)).all()


@given(marginals)
def test_text_reads_back_as_the_same_distribution(lengths: Marginal) -> None:
    assert parse_lengths(lengths.spec) == lengths


@pytest.mark.parametrize("mean", [1, 1.5, 3, 20])
def test_geometric_moments_are_the_sums(mean: float) -> None:
    x = np.arange(1, 5000, dtype=float)
    p = (1 / mean) * (1 - 1 / mean) ** (x - 1)
    assert Geometric(mean).raw_moments() == pytest.approx([p @ x, p @ x**2, p @ x**3])


@pytest.mark.parametrize("mean", [1, 3.7, 40, 1155])
@pytest.mark.parametrize("sigma", [0.1, 0.5, 0.9])
def test_rounded_lognormal_moments_are_the_sums(mean: float, sigma: float) -> None:
    """Against a density summed over a fine grid, rounding each point as a draw is rounded."""
    lengths = LogNormal(mean, sigma)
    z = np.linspace(-9, 9, 400_001)
    density = np.exp(-(z**2) / 2)
    x = np.maximum(1, np.rint(np.exp(lengths.mu + sigma * z)))
    summed = [float(density @ x**k / density.sum()) for k in (1, 2, 3)]
    assert lengths.raw_moments() == pytest.approx(summed, rel=1e-4)


@pytest.mark.parametrize("mean", [100, 1e4, 1e7])
@pytest.mark.parametrize("sigma", [0.3, 1.2, 3.0])
def test_rounding_hardly_moves_long_lognormals(mean: float, sigma: float) -> None:
    """Also where most of the third moment lies beyond the part that is summed term by term."""
    mu = math.log(mean) - sigma**2 / 2
    unrounded = [math.exp(k * mu + (k * sigma) ** 2 / 2) for k in (1, 2, 3)]
    rounded = rounded_lognormal_moments(mu, sigma)
    assert rounded == pytest.approx(unrounded, rel=2e-4 if sigma < 3 else 0.02)
    if mean >= 1e4 and sigma < 3:
        assert rounded == pytest.approx(unrounded, rel=1e-7)


def test_heaviest_lognormal_fits_64_bits() -> None:
    x = LogNormal(MAX_LENGTH, 3.0).sample(np.random.default_rng(0), 1_000_000)
    assert x.min() >= 1
    assert x.max() < 2**62


def test_empirical_weights_decide_the_mean() -> None:
    lengths = Empirical((100, 200), (3, 1))
    assert lengths.mean == pytest.approx(125)
    assert Empirical((100, 200)).mean == pytest.approx(150)
    assert Empirical((0, 7), (0, 1)).smallest == 7


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("fixed:100", Fixed(100)),
        (" geometric:500 ", Geometric(500)),
        ("lognormal:1155:1.2", LogNormal(1155, 1.2)),
        ("empirical:100/200", Empirical((100, 200))),
        ("empirical:100@3/200@1", Empirical((100, 200), (3, 1))),
    ],
)
def test_texts(text: str, lengths: Marginal) -> None:
    assert parse_lengths(text) == lengths


def test_specs_are_short() -> None:
    assert Geometric(500).spec == "geometric:500"
    assert LogNormal(1155, 1.2).spec == "lognormal:1155:1.2"
    assert Empirical((1, 2), (3, 0.5)).spec == "empirical:1@3/2@0.5"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("uniform:1:2", "unknown lengths 'uniform:1:2': expected fixed:100"),
        ("", "unknown lengths ''"),
        ("fixed", "'fixed': expected fixed:TOKENS"),
        ("fixed:1:2", "'fixed:1:2': expected fixed:TOKENS"),
        ("fixed:1.5", "'fixed:1.5': expected fixed:TOKENS"),
        ("geometric:long", "'geometric:long': expected geometric:MEAN"),
        ("lognormal:100", "'lognormal:100': expected lognormal:MEAN:SIGMA"),
        ("empirical:", "'empirical:': expected empirical:TOKENS"),
        ("empirical:1@2/3", "'empirical:1@2/3': expected empirical:TOKENS"),
        ("fixed:-1", "length of fixed is -1: expected a number of tokens from 0"),
        ("geometric:0.5", "mean of geometric is 0.5: expected a number of tokens from 1"),
        ("geometric:nan", "mean of geometric is nan"),
        ("geometric:inf", "mean of geometric is inf"),
        ("lognormal:100:0", "sigma of lognormal is 0.0: give the standard deviation"),
        ("lognormal:100:9", "sigma of lognormal is 9.0: .* at most 3"),
        ("lognormal:100:nan", "sigma of lognormal is nan"),
        ("empirical:1/-2", "a length of empirical is -2"),
        ("empirical:1@0/2@0", "not all zero"),
        ("empirical:1@-1/2@3", "none negative"),
        ("empirical:1@nan", "give finite numbers"),
    ],
)
def test_refused_texts(text: str, says: str) -> None:
    with pytest.raises(PlannerError, match=says):
        parse_lengths(text)


def test_refused_values() -> None:
    with pytest.raises(PlannerError, match="give one at least"):
        Empirical(())
    with pytest.raises(PlannerError, match="1 weights for 2 empirical lengths"):
        Empirical((1, 2), (1.0,))
    with pytest.raises(PlannerError, match="length of fixed"):
        Fixed(MAX_LENGTH + 1)
