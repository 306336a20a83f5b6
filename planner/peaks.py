"""Where a simulated curve of throughput against the ratio has its top.

The top is flat and the points carry noise, so it is a fit's. Nothing here knows what made the
curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import PlannerError

# Narrow: many curves rise slowly and fall off a kink, and a wide parabola's top is left of it (at
# 15 % by 4 % of the ratio); common random numbers leave little noise to smooth.
WINDOW = 0.04
FLAT = 0.003


@dataclass(frozen=True)
class Peak:
    """The top of a curve.

    Attributes:
        ratio: where it is.
        value: how high.
        highest: ratio of the highest single point.
        inside: False where that point is the first or the last one: the top may lie beyond.
    """

    ratio: float
    value: float
    highest: float
    inside: bool


def peak_of(ratios: ArrayLike, values: ArrayLike, window: float = WINDOW) -> Peak:
    """The top by a parabola in log(ratio) through the points around the highest one.

    Least squares over the points within +-``window`` of the highest, at least one on each side, and
    all around it that are lower by ``FLAT`` at most: where a top is flat, the highest point is the
    one that had the most luck. A parabola that opens upwards, or whose top is outside of its
    points, is not taken: then it is the highest point itself.

    Args:
        ratios: ascending, > 0, [k].
        values: throughput per instance, [k].
        window: relative.

    Raises:
        PlannerError: no points, or arrays of different lengths.
    """
    x, y = np.asarray(ratios, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise PlannerError(f"expected equally many ratios and values, got {x.shape} and {y.shape}")
    top = int(np.argmax(y))
    inside = 0 < top < len(x) - 1
    near = np.flatnonzero(np.abs(np.log(x / x[top])) <= np.log1p(window))
    low, high = min(near[0], top - 1), max(near[-1], top + 1)
    level = y >= y[top] * (1 - FLAT)
    below = np.flatnonzero(~level[:top])
    above = np.flatnonzero(~level[top:])
    low = min(low, int(below[-1]) + 1 if len(below) else 0)
    high = max(high, top + int(above[0]) - 1 if len(above) else len(x) - 1)
    part = slice(max(0, low), min(len(x), high + 1))
    plain = Peak(float(x[top]), float(y[top]), float(x[top]), inside)
    if not inside:
        return plain
    logs = np.log(x[part] / x[top])
    bend, slope, start = np.polyfit(logs, y[part], 2)
    if bend >= 0:
        return plain
    at = -slope / (2 * bend)
    if not logs[0] <= at <= logs[-1]:
        return plain
    value = start + slope * at + bend * at * at
    return Peak(float(x[top] * np.exp(at)), float(value), float(x[top]), inside)


def value_at(ratios: ArrayLike, values: ArrayLike, ratio: float) -> float:
    """A curve between its points, linear in log(ratio); held at its ends."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    return float(np.interp(np.log(ratio), logs, np.asarray(values, dtype=np.float64)))
