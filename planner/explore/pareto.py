"""The Pareto front of tokens/s/user against tokens/s/GPU.

Which configurations nobody should prefer another to. Not for choosing one of them: targets do.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.explore.kernels.base import Array
from planner.explore.points import Point


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """Points that no other one beats in both, rising in tokens/s/user.

    Of points that are equal in both, the first is kept.
    """
    given = list(points)
    if not given:
        return ()
    users = np.array([point.tokens_per_s_user for point in given])
    rates = np.array([point.tokens_per_s_gpu for point in given])
    return tuple(given[i] for i in front_indices(users, rates))


def front_indices(users: Array, rates: Array) -> list[int]:
    """Indices of the front of two arrays, more of each is better; rising in ``users``.

    Pairs with a value that isn't finite are never on it.

    Args:
        users: tokens/s/user, one dimension.
        rates: tokens/s/GPU, as long.
    """
    finite = np.flatnonzero(np.isfinite(users) & np.isfinite(rates))
    # the fastest for the user first; of equals, the one that serves more; of these, the first
    order = finite[np.lexsort((finite, -rates[finite], -users[finite]))]
    if not len(order):
        return []
    best_before = np.maximum.accumulate(np.concatenate(([-np.inf], rates[order][:-1])))
    return [int(i) for i in order[rates[order] > best_before][::-1]]
