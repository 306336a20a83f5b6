"""A source of kernel times with times multiplied: what if a side were slower than measured?"""

from __future__ import annotations

from planner.explore.kernels.base import Array, KernelDB, Load, Sides, Time
from planner.explore.model import Model


class Scaled:
    """A ``KernelDB`` that multiplies another one's times.

    Args:
        db: the other one.
        attention: factor on attention.
        experts: factor on experts.
    """

    def __init__(self, db: KernelDB, *, attention: float = 1.0, experts: float = 1.0):
        self._db = db
        self._attention, self._experts = attention, experts
        self.name = f"{db.name}, attention x{attention:g}, experts x{experts:g}"
        # decides the corrections of aggregation
        self.backend = str(getattr(db, "backend", ""))

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        return multiplied(self._db.attention(model, tp, sides, load), self._attention)

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        return multiplied(self._db.experts(model, tp, ep, sides, tokens), self._experts)

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        return self._db.exchange(model, tp, dp, moe_tp, ep, tokens)


def multiplied(time: Time, factor: float) -> Time:
    """The same, so many times as long."""
    return Time({source: factor * seconds for source, seconds in time.parts.items()})
