"""Rows of numbers: the same histograms as counting one by one, also while somebody reads."""

import sys
import threading
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.metrics.rows import Rows

EDGES = ((1.0, 2.0, 4.0), (0.5, 10.0))


@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-99, 99)), max_size=40), st.integers(1, 40))
def test_as_if_counted_one_by_one(values, every):
    rows = Rows(EDGES)
    rows._written = rows._counted = 509  # so that some runs wrap around
    for number, row in enumerate(values):
        rows.add(*row)
        if number % every == 0:
            rows.read()
    for column, (edges, (counts, total)) in enumerate(zip(EDGES, rows.read(), strict=True)):
        expected = [0] * (len(edges) + 1)
        for row in values:
            expected[bisect_left(edges, row[column])] += 1
        assert counts == expected
        assert total == pytest.approx(sum(row[column] for row in values))


def test_scale():
    rows = Rows(EDGES, (1e-9, 1.0))
    rows.add(3_000_000_000, 0.5)
    assert rows.read() == [([0, 0, 1, 0], 3.0), ([1, 0, 0], 0.5)]


def test_more_rows_than_the_ring_holds():
    rows = Rows(EDGES)
    for _ in range(5_000):
        rows.add(1.5, 0.1)
    assert rows.read() == [([0, 5_000, 0, 0], 7_500.0), ([5_000, 0, 0], pytest.approx(500.0))]


def test_nothing_is_lost_while_others_read():
    rows, done = Rows(EDGES), threading.Event()
    seen: list[int] = []

    def read():
        while not done.is_set():
            seen.append(sum(rows.read()[0][0]))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for _ in range(20_000):
        rows.add(3.0, 3.0)
    done.set()
    for reader in readers:
        reader.join()
    assert rows.read() == [([0, 0, 20_000, 0], 60_000.0), ([0, 20_000, 0], 60_000.0)]
    assert max(seen) <= 20_000


def test_the_tap_gets_every_row_once_and_whole():
    seen = []
    rows = Rows(EDGES, (1e-9, 1.0, 1.0), extra=1, tap=seen.append)
    for number in range(1_500):
        rows.add(1e9, 0.5, number)
    assert sum(map(len, seen)) >= 512, "without being asked, once the ring is full"
    rows.flush()
    rows.flush()
    every = np.concatenate(seen)
    assert every[:, 2].tolist() == list(range(1_500))
    assert (every[:, :2] == (1.0, 0.5)).all()
    assert len(rows.read()) == 2


def test_a_row_leaves_nothing_behind():
    rows = Rows(EDGES)
    for _ in range(600):
        rows.add(3.0, 3.0)
    before = sys.getallocatedblocks()
    for _ in range(400):
        rows.add(3.0, 3.0)
    assert sys.getallocatedblocks() - before < 40
