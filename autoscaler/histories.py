"""What one sender has told, put in order: batches may come late, twice, or not at all.

A sender is one life of a process. Its times are on its own monotonic clock; the quickest message of
late says how far that is from ours, so that neither clocks that differ nor slow answers move
anything. Pure. Not for windows over several senders: see ``telemetry``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.telemetry import STEP_COLUMNS
from cluster.request_log import Record

_AT = STEP_COLUMNS.index("at")


class History:
    """Answers of one sender, by its clock.

    Args:
        keep_s: how far back answers are kept from the newest one.
    """

    def __init__(self, keep_s: float):
        self.keep_s = keep_s
        self.began: float | None = None
        """When its first record was, on its clock; None: nobody knows of one."""
        self._clocks: list[float] = []
        self._answers: dict[float, Mapping[str, Any]] = {}
        self._received: dict[float, float] = {}

    @property
    def heard(self) -> float:
        """When the newest answer came, on our clock."""
        return self._received[self._clocks[-1]]

    @property
    def latest(self) -> Mapping[str, Any]:
        """The newest answer."""
        return self._answers[self._clocks[-1]]

    @property
    def offset(self) -> float:
        """Our clock less the sender's, seconds."""
        return min(received - clock for clock, received in self._received.items())

    @property
    def reach(self) -> float:
        """Up to when we know what it did, on our clock."""
        return self._clocks[-1] + self.offset

    def take(self, batch: Mapping[str, Any], now: float) -> None:
        """Take in an answer that came at ``now``; one that is known already changes nothing."""
        clock = batch["clock"]
        if clock in self._answers:
            self._received[clock] = min(self._received[clock], now)
            return
        insort(self._clocks, clock)
        self._answers[clock] = batch
        self._received[clock] = now
        began = batch.get("began")
        if began is not None:
            self.began = began if self.began is None else min(began, self.began)
        cut = bisect_left(self._clocks, self._clocks[-1] - self.keep_s)
        for old in self._clocks[:cut]:
            del self._answers[old], self._received[old]
        del self._clocks[:cut]

    def between(
        self, start: float, floor: float
    ) -> tuple[Mapping[str, Any], Mapping[str, Any], float] | None:
        """Two answers to take differences of totals, and the seconds from the one to the other.

        The first is the last one up to ``start``, but not before ``floor``; both on our clock.
        None when there are no two.
        """
        offset = self.offset
        first = bisect_left(self._clocks, floor - offset)
        base = max(first, bisect_right(self._clocks, start - offset) - 1)
        if base >= len(self._clocks) - 1:
            return None
        old, new = self._clocks[base], self._clocks[-1]
        return self._answers[old], self._answers[new], new - old


class StepHistory(History):
    """An attention worker's; rows in the columns of ``STEP_COLUMNS``."""

    def __init__(self, keep_s: float):
        super().__init__(keep_s)
        self._numbers = np.zeros(0, dtype=np.int64)
        self._rows = np.zeros((0, len(STEP_COLUMNS)))

    def take(self, batch: Mapping[str, Any], now: float) -> None:
        """Take in an answer with its ``steps``; each step counts once."""
        steps, number = batch["steps"], batch["number"]
        slim = {key: value for key, value in batch.items() if key not in ("steps", "columns")}
        super().take(slim, now)
        if not len(steps):
            return
        numbers = np.arange(number - len(steps) + 1, number + 1)
        numbers = np.concatenate((self._numbers, numbers))
        rows = np.concatenate((self._rows, np.asarray(steps)))
        self._numbers, places = np.unique(numbers, return_index=True)
        self._rows = rows[places]
        young = self._rows[:, _AT] >= self._rows[-1, _AT] - self.keep_s
        self._numbers, self._rows = self._numbers[young], self._rows[young]

    def steps(self, start: float, warmup_steps: int) -> np.ndarray:
        """Steps that ended after ``start`` (our clock), the worker's first ones left out."""
        ended = self._rows[:, _AT] > start - self.offset
        return self._rows[ended & (self._numbers > warmup_steps)]


class RequestHistory(History):
    """A frontend's."""

    def __init__(self, keep_s: float):
        super().__init__(keep_s)
        self._records: dict[int, Record] = {}

    def take(self, batch: Mapping[str, Any], now: float) -> None:
        """Take in a report with its ``events``; each counts once."""
        super().take({key: value for key, value in batch.items() if key != "events"}, now)
        for record in batch["events"]:
            self._records[record.number] = record
        oldest = self._clocks[-1] - self.keep_s
        self._records = {n: record for n, record in self._records.items() if record.at >= oldest}

    def records(self, start: float) -> list[Record]:
        """Records after ``start`` (our clock), in order; their times stay on the sender's."""
        after = start - self.offset
        found = [record for record in self._records.values() if record.at > after]
        return sorted(found, key=lambda record: record.number)


def bins_between(old: Any, new: Any) -> np.ndarray:
    """Rows of ``RIDE_COLUMNS`` less earlier ones of the same class."""
    before = {int(row[0]): row for row in np.asarray(old)}
    rows = []
    for row in np.asarray(new):
        less = row.copy()
        if int(row[0]) in before:
            less[1:] -= before[int(row[0])][1:]
        if less[1] > 0:
            rows.append(less)
    return np.array(rows).reshape(-1, np.shape(new)[1])


def wire_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Totals of an attention actor's ``wire`` less earlier ones."""
    found: dict[str, Any] = {
        key: max(0, new[key] - old[key])
        for key in ("frames", "tokens", "hops", "bytes_out", "bytes_back")
    }
    # What the split of a hop's two ways guesses may be corrected later, so these may seem to fall.
    found["seconds"] = {
        stage: max(0.0, new["seconds"][stage] - old["seconds"][stage]) for stage in new["seconds"]
    }
    return found
