"""Quantiles of the digest against exact ones."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.digest import ACCURACY, Digest, Percentiles


@given(
    values=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=200),
    share=st.floats(0, 1),
)
def test_a_quantile_is_within_its_accuracy_of_the_exact_one(values, share):
    digest = Digest()
    for value in values:
        digest.add(value)

    exact = np.quantile(values, share, method="lower")
    assert digest.quantile(share) == pytest.approx(exact, rel=ACCURACY * 1.001)


def test_counts_means_and_extremes_are_exact():
    digest = Digest()
    digest.add(2.0, times=3)
    digest.add(10.0)
    digest.add(5.0, times=0)

    summary = digest.percentiles()
    assert (summary.count, summary.mean, summary.least, summary.most) == (4, 4.0, 2.0, 10.0)


def test_an_empty_digest_knows_nothing():
    assert Digest().percentiles().count == 0
    assert math.isnan(Digest().quantile(0.5))
    assert math.isnan(Percentiles().p50)


def test_zero_has_a_place():
    digest = Digest()
    digest.add(0.0, times=9)
    digest.add(1.0)

    assert digest.quantile(0.5) == 0.0
    assert digest.quantile(1.0) == pytest.approx(1.0, rel=ACCURACY)


def test_memory_does_not_grow_with_the_number_of_values():
    digest = Digest()
    for value in np.random.default_rng(0).lognormal(3, 2, 20_000).tolist():
        digest.add(value)

    assert len(digest.buckets) < 1000
