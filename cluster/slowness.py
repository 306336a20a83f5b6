"""Which actors are slow to reach, from how long frames are on the wire (pure, no clock, no Ray).

A step waits for the last FFN actor's answer in every layer, so one bad cable or one NIC that fell
back to another speed slows everybody down while nothing fails. Not for slow compute or full queues:
only for the time between two processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.nearness import AGAIN_S, EXCESS_S, FACTOR, REPORTS
from cluster.spec import ROLES, Role

STALE_S = 1.5 * AGAIN_S
"""Age of a report that says nothing any more: an actor that is avoided for being far away is not
reported until it is asked again."""


@dataclass(frozen=True)
class Slowness:
    """``ratios`` as of the function of that name; ``slow``: how many actors are slow, by role."""

    ratios: Mapping[tuple[Role, str], float] = field(default_factory=dict)
    slow: Mapping[Role, int] = field(default_factory=dict)


class WireTimes:
    """What attention actors reported of the wire to FFN actors, the last few times."""

    def __init__(self) -> None:
        self._heard: dict[tuple[str, str], deque[tuple[float, float]]] = {}

    def hear(self, attention: str, wire_s: Mapping[str, float], now: float) -> None:
        """A report.

        Args:
            wire_s: FFN actor -> median seconds on the wire, there and back.
            now: monotonic seconds.
        """
        self._heard = {
            pair: reports
            for pair, reports in self._heard.items()
            if now - reports[-1][0] <= STALE_S
        }
        for ffn, seconds in wire_s.items():
            reports = self._heard.setdefault((attention, ffn), deque(maxlen=REPORTS))
            reports.append((now, seconds))

    def pairs(self, now: float) -> dict[tuple[str, str], float]:
        """(attention, FFN) -> the least of the last reports; only of those with enough of them."""
        return {
            pair: min(seconds for _, seconds in reports)
            for pair, reports in list(self._heard.items())
            if len(reports) == REPORTS and now - reports[-1][0] <= STALE_S
        }


def ratios(wire_s: Mapping[tuple[str, str], float]) -> dict[tuple[Role, str], float]:
    """How much longer the wire to each actor takes than to the fastest of its role.

    An actor's time is the least that any actor of the other role sees: who is far from one only
    is not slow itself.

    Args:
        wire_s: (attention, FFN) -> seconds, there and back.

    Returns:
        (role, actor) -> ratio, at least 1; without roles of which fewer than two are known.
    """
    found: dict[tuple[Role, str], float] = {}
    for side, role in enumerate(ROLES):
        least: dict[str, float] = {}
        for pair, seconds in wire_s.items():
            least[pair[side]] = min(seconds, least.get(pair[side], seconds))
        fastest = min(least.values(), default=0.0)
        if len(least) > 1 and fastest > 0:
            found |= {(role, name): seconds / fastest for name, seconds in least.items()}
    return found


def slow(wire_s: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """The actors that are slow to reach -> their ratio; arguments as of ``ratios``."""
    found: dict[str, float] = {}
    for (role, name), ratio in ratios(wire_s).items():
        side = ROLES.index(role)
        own = min(seconds for pair, seconds in wire_s.items() if pair[side] == name)
        if ratio >= FACTOR and own - own / ratio >= EXCESS_S:
            found[name] = ratio
    return found
