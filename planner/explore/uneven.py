"""Experts on a number of GPUs that doesn't divide them, where only even splits were measured.

The rank with the most experts sets the time, and in experts held the time is close to a line: so
many weights to read, so many tokens to compute. So what lies between two measured splits is
interpolated by the experts of the fullest rank, and says so.
"""

from __future__ import annotations

from planner.explore.kernels.base import Array, KernelDB, Provenance, Sides, Time
from planner.explore.model import Model


def experts_time(db: KernelDB, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
    """``KernelDB.experts`` between the powers of two around a number of expert groups.

    Raises:
        NotCovered: not both of them are covered.
    """
    below = 1 << (ep.bit_length() - 1)
    above = min(2 * below, model.experts)
    held, most, least = (-(-model.experts // groups) for groups in (ep, below, above))
    fuller = db.experts(model, tp, below, sides, tokens)
    if held == most:
        return interpolated(fuller, fuller, 1.0)
    emptier = db.experts(model, tp, above, sides, tokens)
    return interpolated(fuller, emptier, (held - least) / (most - least))


def interpolated(one: Time, other: Time, share: float) -> Time:
    """``share`` of one and the rest of the other; what was measured is interpolated now."""
    parts: dict[Provenance, Array] = {}
    for time, weight in ((one, share), (other, 1.0 - share)):
        for source, seconds in time.parts.items():
            label = Provenance.INTERPOLATED if source is Provenance.MEASURED else source
            parts[label] = parts.get(label, 0.0) + weight * seconds
    return Time(parts)
