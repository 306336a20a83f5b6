"""The store of measurements: newest by load class, and bounded."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.samples import Samples


def column(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)[:, None]


def test_a_message_leaves_one_median_for_each_class() -> None:
    samples = Samples(1)
    samples.add(column(8, 8, 8, 64), column(1.0, 3.0, 100.0, 7.0), at=0.0)
    loads, values, classes = samples.columns()
    assert sorted(zip(loads, values, strict=True)) == [(8.0, 3.0), (64.0, 7.0)]
    assert len(set(classes)) == 2


def test_the_newest_of_a_class_replace_the_older() -> None:
    samples = Samples(1, kept=2)
    samples.add(column(64), column(9.0), at=0.0)
    for at in range(1, 100):
        samples.add(column(8), column(float(at)), at=float(at))
    loads, values, _ = samples.columns()
    assert sorted(values[loads == 8]) == [98.0, 99.0]
    assert list(values[loads == 64]) == [9.0]


def test_too_many_classes_drop_the_one_that_is_oldest() -> None:
    samples = Samples(1, classes=3)
    for at, load in enumerate((1, 4, 16, 64)):
        samples.add(column(load), column(1.0), at=float(at))
    assert sorted(samples.columns()[0]) == [4.0, 16.0, 64.0]


def test_old_samples_go() -> None:
    samples = Samples(1)
    samples.add(column(1, 64), column(1.0, 1.0), at=0.0)
    samples.add(column(64), column(2.0), at=5.0)
    samples.forget(3.0)
    assert [list(values) for values in samples.columns()[:2]] == [[64.0], [2.0]]


def test_nothing_is_learnt_from_what_is_no_number() -> None:
    samples = Samples(1)
    samples.add(column(1, np.nan, 4), column(np.inf, 1.0, np.nan), at=0.0)
    assert len(samples) == 0
    assert all(len(values) == 0 for values in samples.columns())


@given(st.lists(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e3)), max_size=5), max_size=30))
def test_it_is_bounded_and_keeps_what_came_last(messages: list[list[tuple[float, float]]]) -> None:
    samples = Samples(1, kept=3, classes=4)
    for at, message in enumerate(messages):
        rows = np.array(message, dtype=np.float64).reshape(-1, 2)
        samples.add(rows[:, :1], rows[:, 1:], float(at))
        assert len(samples) <= 12
        if message:
            assert len(samples) > 0
