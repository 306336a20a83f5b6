"""Simulated time: a heap of things to do, each at its time.

Things due at one time happen in the order in which they were asked for, which makes a run
repeatable to the bit. Knows nothing of what happens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any


class Clock:
    """The time, and what is to be done when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._asked = 0
        self._stopped = False

    @property
    def idle(self) -> bool:
        """Whether nothing more is due."""
        return not self._due

    def at(self, time: float, action: Callable[[Any], None], subject: Any = None) -> None:
        """Calls ``action(subject)`` at ``time``, which must not be past."""
        self._asked += 1
        heappush(self._due, (time, self._asked, action, subject))

    def stop(self) -> None:
        """Ends the run after the action at hand."""
        self._stopped = True

    def run(self, until: float = math.inf) -> None:
        """Does everything due up to ``until``, or until stopped or until nothing is due."""
        due = self._due
        while due and not self._stopped:
            time, _, action, subject = heappop(due)
            if time > until:
                self.now = until
                return
            self.now = time
            action(subject)
