"""What an actor can tell of its work lately: a record per engine step, sums over kernel calls.

Fed by ``metrics.rows`` in bulk, asked by whoever wants to know (the controller, a recording): the
caller keeps the cursor, so any number may ask and nobody has to. Memory is bounded; records that
were written over before somebody read them are counted as missed. Times are on this process's
monotonic clock. Not for Prometheus (``metrics``), nor for windows and percentiles (``autoscaler``).
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

import numpy as np

from actors.errors import AffluxError

KEPT_STEPS = 8192

STEP_COLUMNS = (
    "at",
    "step",
    "compute",
    "wait",
    "lanes",
    "tokens",
    "requests",
    "decoding",
    "prefill_tokens",
    "context",
    "epoch",
    "interrupted",
    "layers",
    "hops",
)
"""Of a step: when it ended, its seconds and what of them somebody computed or all lanes waited,
lanes, scheduled tokens, requests, how many of these had one token scheduled, the tokens of the
others, context tokens of all requests, epoch, 1 if it waited for a table, and seconds summed over
lanes: attention's work between two hops (all layers but the first), and waits for experts."""

RIDE_COLUMNS = (
    "bin",
    "rides",
    "pairs",
    "pairs2",
    "seconds",
    "seconds2",
    "pairs_seconds",
    "tokens",
)
"""Of a class of kernel calls: its number, and sums over its calls; pairs2 is a sum of squares,
pairs_seconds one of products: enough for a line through them."""

_PER_OCTAVE = 4
_BINS = 4 * 40


class Origin:
    """Tells one life of a process from another, and its clock from the world's."""

    def __init__(self) -> None:
        self._incarnation = uuid.uuid4().hex

    def now(self) -> dict[str, Any]:
        """``incarnation``; this moment as ``clock`` (monotonic) and ``unix`` seconds."""
        return {
            "incarnation": self._incarnation,
            "clock": time.perf_counter(),
            "unix": time.time(),
        }


class StepLog:
    """The newest engine steps. ``take`` and ``since`` may be called by different threads.

    Args:
        kept: steps that are remembered.
    """

    def __init__(self, kept: int = KEPT_STEPS):
        self._ring = np.zeros((kept, len(STEP_COLUMNS)))
        self._number = 0
        self._began: float | None = None
        self._origin = Origin()
        self._lock = threading.Lock()

    def take(self, rows: np.ndarray) -> None:
        """Take in float64[n, STEP_COLUMNS], oldest first."""
        if not len(rows):
            return
        kept = len(self._ring)
        with self._lock:
            if self._began is None:
                self._began = float(rows[0, 0] - rows[0, 1])
            self._number += len(rows)
            last = rows[-kept:]
            self._ring[np.arange(self._number - len(last), self._number) % kept] = last

    def since(self, number: int) -> dict[str, Any]:
        """Steps above ``number``, oldest first; they are numbered from 1.

        A number that has not been given out yet is of another process's life and counts as 0.

        Returns:
            ``number`` of the newest, ``missed``, ``began`` (clock, of the first step; None before
            it), ``columns``, ``steps`` float64[n, columns], and ``Origin.now``.
        """
        with self._lock:
            newest, kept = self._number, len(self._ring)
            seen = number if 0 <= number <= newest else 0
            first = max(seen, newest - kept)
            steps = self._ring[np.arange(first, newest) % kept]
            began = self._began
        return {
            **self._origin.now(),
            "number": newest,
            "missed": first - seen,
            "began": began,
            "columns": STEP_COLUMNS,
            "steps": steps,
        }


class RideSums:
    """Kernel calls since the start by how many pairs they had, four classes per power of two."""

    def __init__(self) -> None:
        self._sums = np.zeros((_BINS, len(RIDE_COLUMNS) - 1))
        self._began: float | None = None
        self._origin = Origin()
        self._lock = threading.Lock()

    def take(self, rows: np.ndarray) -> None:
        """Take in float64[n, 4]: seconds busy, seconds of the kernel, tokens, pairs."""
        if not len(rows):
            return
        seconds, _, tokens, pairs = rows.T
        bins = (_PER_OCTAVE * np.log2(np.maximum(pairs, 1.0))).astype(np.int64)
        bins = np.minimum(bins, _BINS - 1)
        columns = (None, pairs, pairs**2, seconds, seconds**2, pairs * seconds, tokens)
        added = [np.bincount(bins, weights, minlength=_BINS) for weights in columns]
        with self._lock:
            if self._began is None:
                self._began = time.perf_counter()
            self._sums += np.stack(added, axis=1)

    def totals(self) -> dict[str, Any]:
        """``rides``, ``began`` (clock, about when the first was; None before it), ``columns``,
        ``bins`` float64[b, columns] with a row per class that had any, and ``Origin.now``."""
        with self._lock:
            sums, began = self._sums.copy(), self._began
        used = np.flatnonzero(sums[:, 0])
        return {
            **self._origin.now(),
            "began": began,
            "columns": RIDE_COLUMNS,
            "bins": np.column_stack((used, sums[used])),
        }


def no_telemetry(state: str) -> AffluxError:
    """The error of an actor that measures nothing, or nothing yet."""
    return AffluxError(
        f"this actor ({state}) has no telemetry: it has not been started, or metrics.enabled is "
        "false in the spec",
        code="no_telemetry",
    )
