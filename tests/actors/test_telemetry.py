"""What an actor tells of its work: every step once, sums that a line can be fitted to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.telemetry import RIDE_COLUMNS, STEP_COLUMNS, RideSums, StepLog


def steps(first: int, count: int) -> np.ndarray:
    """Rows whose first column is their number."""
    rows = np.zeros((count, len(STEP_COLUMNS)))
    rows[:, 0] = np.arange(first, first + count)
    rows[:, 1] = 0.25
    return rows


def test_an_empty_log():
    answer = StepLog(4).since(0)
    assert answer["number"] == answer["missed"] == 0 and answer["began"] is None
    assert answer["steps"].shape == (0, len(STEP_COLUMNS))


@given(st.integers(1, 20), st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=20))
def test_every_step_once_or_counted_as_missed(kept, rounds):
    log, cursor, written, seen, missed = StepLog(kept), 0, 0, [], 0
    for count, read in rounds:
        log.take(steps(written + 1, count))
        written += count
        if read:
            answer = log.since(cursor)
            cursor = answer["number"]
            seen += answer["steps"][:, 0].tolist()
            missed += answer["missed"]
            assert cursor == written
    answer = log.since(cursor)
    seen += answer["steps"][:, 0].tolist()
    missed += answer["missed"]
    assert seen == sorted(set(seen))
    assert len(seen) + missed == written
    if written:
        assert answer["began"] == 0.75, "when the first step began, however long ago"


def test_readers_do_not_disturb_each_other():
    log = StepLog()
    log.take(steps(1, 5))
    assert len(log.since(0)["steps"]) == len(log.since(0)["steps"]) == 5
    assert len(log.since(3)["steps"]) == 2
    assert len(log.since(99)["steps"]) == 5, "a cursor of another life"
    assert log.since(0)["incarnation"] != StepLog().since(0)["incarnation"]


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100), st.integers(0, 10**6)),
        max_size=50,
    )
)
def test_sums_of_rides(rides):
    sums = RideSums()
    rows = np.array(rides, dtype=float).reshape(-1, 4)
    for part in np.array_split(rows, 3):
        sums.take(part)
    bins = sums.totals()["bins"]
    assert bins.shape == (len(bins), len(RIDE_COLUMNS))
    total = dict(zip(RIDE_COLUMNS, bins.sum(axis=0), strict=True))
    busy, _, tokens, pairs = rows.T
    assert total["rides"] == len(rides)
    assert total["pairs"] == pytest.approx(pairs.sum())
    assert total["pairs2"] == pytest.approx((pairs**2).sum())
    assert total["seconds"] == pytest.approx(busy.sum())
    assert total["pairs_seconds"] == pytest.approx((pairs * busy).sum())
    assert total["tokens"] == tokens.sum()
    assert len(set(bins[:, 0])) == len(bins)


def test_a_line_comes_back_from_its_sums():
    pairs = np.repeat([64.0, 100.0, 1000.0], 20)
    seconds = 1e-3 + 2e-6 * pairs
    sums = RideSums()
    sums.take(np.column_stack((seconds, seconds, pairs, pairs)))
    bins = sums.totals()["bins"]
    assert len(bins) == 3
    _, n, x, xx, y, _, xy, _ = bins.sum(axis=0)
    slope = (n * xy - x * y) / (n * xx - x * x)
    assert slope == pytest.approx(2e-6)
    assert (y - slope * x) / n == pytest.approx(1e-3)
