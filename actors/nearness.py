"""Which FFN actors one attention actor had better not ask where somebody nearer holds the same.

Pure, no clock. Decides by how long frames are on the wire, and only that: who has much to do is the
business of placement, and an expert that only a far actor holds is still asked of it. What all
attention actors see together, and where actors go for it, is ``cluster.slowness``'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

FACTOR = 2.0
"""Times the nearest actor's wire from which on another one is far."""

EXCESS_S = 1e-3
"""And so much more than it: no wire inside a data centre takes a millisecond."""

REPORTS = 3
"""Reports in a row that have to agree."""

AGAIN_S = 60.0
"""An actor that is not asked is not measured either, so it is asked again after this time."""


class Nearness:
    """What one attention actor knows of its wires."""

    def __init__(self) -> None:
        self._heard: dict[str, deque[float]] = {}
        self._far: dict[str, float] = {}

    def hear(self, wire_s: Mapping[str, float], now: float) -> frozenset[str]:
        """A report; tells which actors are far.

        Args:
            wire_s: FFN actor -> median seconds on the wire, there and back; only of those that
                were asked something since the last report.
            now: monotonic seconds.
        """
        self._far = {actor: until for actor, until in self._far.items() if now < until}
        for actor, seconds in wire_s.items():
            self._heard.setdefault(actor, deque(maxlen=REPORTS)).append(seconds)
        least = {
            actor: min(reports)
            for actor, reports in self._heard.items()
            if len(reports) == REPORTS and actor in wire_s
        }
        if least:
            nearest = min(least, key=least.__getitem__)
            self._far.pop(nearest, None)  # others have become worse
            for actor, seconds in least.items():
                more = seconds - least[nearest]
                if seconds >= FACTOR * least[nearest] and more >= EXCESS_S:
                    self._far[actor] = now + AGAIN_S
                    del self._heard[actor]  # what was long ago says nothing of the next attempt
        return frozenset(self._far)
