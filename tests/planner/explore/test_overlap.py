"""The overlap of AFD's micro-batches: by hand, and what must always hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore.overlap import micro_batches, overlapped

times = st.lists(st.floats(0.0, 10.0), min_size=4, max_size=4)
lanes = st.integers(1, 8)
layers = st.integers(1, 100)


def test_by_hand() -> None:
    step = overlapped([2.0, 0.5, 3.0, 0.5], lanes=4, layers=10)
    # 4 * 3 for the slowest, a tenth of 2 + 0.5 + 0.5 while the pipeline fills
    assert step.paper == pytest.approx(12.3)
    assert step.safe == pytest.approx(12.3)


def test_few_micro_batches_can_not_hide_their_own_passage() -> None:
    step = overlapped([2.0, 2.0, 2.0, 2.0], lanes=1, layers=60)
    assert step.paper == pytest.approx(2.1)
    assert step.safe == pytest.approx(8.0)


def test_arrays_broadcast() -> None:
    step = overlapped([np.ones((3, 1)), 2.0, np.array([1.0, 5.0])], np.array([1, 4]), 2)
    assert step.paper == pytest.approx(np.array([[3.0, 21.5]] * 3))


@given(times, lanes, layers)
def test_safe_is_never_less(stages: list[float], lanes: int, layers: int) -> None:
    step = overlapped(stages, lanes, layers)
    assert step.safe >= step.paper
    assert step.safe >= sum(stages) * (1 - 1e-12)


@given(times, lanes, layers, st.integers(0, 3), st.floats(0.0, 5.0))
def test_more_never_takes_less(
    stages: list[float], lanes: int, layers: int, which: int, more: float
) -> None:
    slower = [s + more * (i == which) for i, s in enumerate(stages)]
    before, after = overlapped(stages, lanes, layers), overlapped(slower, lanes, layers)
    wider = overlapped(stages, lanes + 1, layers)
    for name in ("paper", "safe"):
        least = getattr(before, name) * (1 - 1e-12)
        assert getattr(after, name) >= least
        assert getattr(wider, name) >= least


@given(st.integers(1, 5000), lanes)
def test_micro_batches_hold_the_batch(batch: int, lanes: int) -> None:
    count, size = (int(x) for x in micro_batches(np.array(batch), lanes))
    assert count == min(batch, lanes)
    assert count * size >= batch > count * (size - 1)


@pytest.mark.parametrize(
    ("stages", "lanes", "layers", "text"),
    [
        ([], 1, 1, "no stages"),
        ([1.0], 0, 1, "at least 1"),
        ([1.0], 1, 0, "at least 1"),
        ([1.0, -1.0], 1, 1, "less than no time"),
    ],
)
def test_nonsense_is_refused(stages: list[float], lanes: int, layers: int, text: str) -> None:
    with pytest.raises(PlannerError, match=text):
        overlapped(stages, lanes, layers)
