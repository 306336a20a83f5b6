"""What latencies would be with other numbers of workers: by the model, or in proportion.

For policies that react to symptoms and look before they take something away. The prediction itself
is ``autoscaler.predict``'s.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from autoscaler.limits import Counts
from autoscaler.policy import View
from autoscaler.predict import predict_load, predict_ttft
from planner.errors import PlannerError


class Times(NamedTuple):
    """Two latencies in the snapshot's unit, or one as a multiple of another; nan: unknown."""

    ttft: float
    tpot: float


UNKNOWN = Times(math.nan, math.nan)


class Ahead:
    """Predictions for one view, at its rate of arrivals; each is worked out once."""

    def __init__(self, view: View):
        self._view = view
        self._known: dict[Counts, Times] = {}

    def expected(self, counts: Counts) -> Times:
        """What the model expects; unknown without one that is to be trusted.

        inf where so many workers can't follow.
        """
        if counts not in self._known:
            self._known[counts] = self._predict(counts)
        return self._known[counts]

    def slower(self, counts: Counts) -> Times:
        """Latencies at other numbers of workers over those at the present ones.

        Without a model in proportion to the role that loses most: a worker less of n takes n/(n-1)
        as long, which is more than it does to all that does not depend on load.
        """
        serving = Counts(self._view.snapshot.attention, self._view.snapshot.ffn)
        if min(*counts, *serving) < 1:
            return Times(math.inf, math.inf)
        rule = max(old / new for old, new in zip(serving, counts, strict=True))
        now, then = self.expected(serving), self.expected(counts)
        ratios = (
            new / old if 0 < old < math.inf and not math.isnan(new) else rule
            for old, new in zip(now, then, strict=True)
        )
        return Times(*ratios)

    def _predict(self, counts: Counts) -> Times:
        model, system = self._view.model, self._view.system
        if model is None or not model.reliable or min(counts) < 1:
            return UNKNOWN
        rate = self._view.snapshot.arrival_rate
        try:
            _, tpot = predict_load(model, system, *counts, rate)
            return Times(predict_ttft(model, system, *counts, rate), tpot)
        except PlannerError:  # a load that was never measured
            return UNKNOWN
