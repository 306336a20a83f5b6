"""Rows of numbers, a histogram per column; made so that taking one in costs next to nothing.

The hot path writes a row into a ring of memory that is there already: no object is kept, no bucket
is looked for, no lock is taken. Buckets are counted for many rows at once, when somebody reads or
the ring is full; who wants the rows themselves gets them then too. Not for values that several
threads take in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from struct import Struct

import numpy as np

_ROWS = 512


class Rows:
    """See the module. ``add`` belongs to one thread, ``read`` to any.

    Args:
        edges: upper edges of each column's buckets, ascending, after scaling.
        scale: what each column is multiplied by, e.g. 1e-9 for nanoseconds; None for 1.
        extra: how many columns follow that have no histogram.
        tap: gets float64[n, columns] with every row once, in order and scaled, now and then; called
            by whoever counts, one call at a time.
    """

    def __init__(
        self,
        edges: Sequence[Sequence[float]],
        scale: Sequence[float] | None = None,
        *,
        extra: int = 0,
        tap: Callable[[np.ndarray], None] | None = None,
    ):
        width = len(edges) + extra
        self._edges = [np.asarray(column, dtype=np.float64) for column in edges]
        self._scale = np.asarray(scale if scale is not None else [1.0] * width)
        self._tap = tap
        self._counts = [np.zeros(len(column) + 1, dtype=np.int64) for column in self._edges]
        self._sums = np.zeros(len(edges))
        row = Struct(f"{width}d")
        self._pack, self._row_bytes = row.pack_into, row.size
        self._memory = bytearray(_ROWS * row.size)
        self._ring = np.frombuffer(self._memory).reshape(_ROWS, width)
        self._written = 0
        self._counted = 0
        self._lock = threading.Lock()

    def add(self, *row: float) -> None:
        """Take in one value per column."""
        written = self._written
        if written - self._counted >= _ROWS:
            self.flush()
        self._pack(self._memory, written % _ROWS * self._row_bytes, *row)
        self._written = written + 1  # only now may a reader look at it

    def read(self) -> list[tuple[list[int], float]]:
        """Per column with edges: counts by bucket (one more than edges) and the sum of values."""
        self.flush()
        with self._lock:
            return [
                (counts.tolist(), float(total))
                for counts, total in zip(self._counts, self._sums, strict=True)
            ]

    def flush(self) -> None:
        """Count what has been taken in, and hand it to the tap; from any thread."""
        with self._lock:
            until = self._written
            rows = self._ring[np.arange(self._counted, until) % _ROWS] * self._scale
            for counts, edges, column in zip(self._counts, self._edges, rows.T, strict=False):
                places = np.searchsorted(edges, column, side="left")
                counts += np.bincount(places, minlength=len(counts))
            self._sums += rows.sum(axis=0)[: len(self._sums)]
            self._counted = until  # only now may they be written over
            if self._tap is not None and len(rows):
                self._tap(rows)
