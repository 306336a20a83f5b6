"""A function of whole numbers that is slow to ask, as a table with enough points.

The table starts at given points, which is exact where the function is linear between them, and
halves intervals until the midpoint lies near the line between its neighbours. Asked for larger
numbers it grows. It isn't for functions with jumps: it would follow each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np

from planner.explore.kernels.base import Array

TOLERANCE = 0.004
"""Error at a midpoint, relative, below which an interval isn't halved further."""


class Adaptive:
    """``function`` for any real numbers from 1 on, linear between the points that were asked.

    Args:
        function: of a whole number >= 1; may raise, which is passed on.
        points: whole numbers where it bends.
    """

    def __init__(self, function: Callable[[int], float], points: Iterable[float] = ()):
        self._function = function
        self._bends = sorted({int(point) for point in points if point >= 1})
        self._known: dict[int, float] = {}
        self._x = np.zeros(0)
        self._y = np.zeros(0)

    def __call__(self, x: Array) -> Array:
        """Values for ``x``, any shape."""
        x = np.maximum(np.asarray(x, float), 1.0)
        if not x.size:
            return np.zeros(x.shape)
        most = float(np.max(x))
        if not len(self._x) or most > self._x[-1]:
            self._grow(1 << int(np.ceil(np.log2(most))))
        return np.interp(x, self._x, self._y)

    def _grow(self, end: int) -> None:
        """Covers 1 .. ``end``."""
        start = int(self._x[-1]) if len(self._x) else 1
        powers = [1 << k for k in range(end.bit_length()) if start <= 1 << k <= end]
        bends = [bend for bend in self._bends if start <= bend <= end]
        fixed = sorted({start, end, *powers, *bends})
        for low, high in pairwise(fixed):
            self._refine(low, high)
        if len(fixed) == 1:
            self._at(fixed[0])
        self._x = np.array(sorted(self._known), float)
        self._y = np.array([self._known[int(x)] for x in self._x])

    def _refine(self, low: int, high: int) -> None:
        pending = [(low, high)]
        while pending:
            low, high = pending.pop()
            left, right = self._at(low), self._at(high)
            if high - low < 2:
                continue
            # geometric, for sizes are: the arithmetic middle of 1..1024 tells little of 1..32
            middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
            line = left + (right - left) * (middle - low) / (high - low)
            value = self._at(middle)
            if abs(value - line) > TOLERANCE * abs(value):
                pending += [(low, middle), (middle, high)]

    def _at(self, x: int) -> float:
        if x not in self._known:
            self._known[x] = self._function(x)
        return self._known[x]
