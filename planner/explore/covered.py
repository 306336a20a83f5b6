"""Asking a source of kernel times for many loads, of which it may cover only some."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.explore.kernels.base import Array, NotCovered, Time


def seconds_where_covered(ask: Callable[[Array], Time], loads: Array) -> tuple[Array, str]:
    """Seconds per load, nan where the source refuses, and one of its refusals ("" without).

    Sources refuse a whole call for one load too large. Coverage ends somewhere as loads grow, so
    the largest covered one is bisected.

    Args:
        ask: of ascending indices into ``loads``: the times.
        loads: one dimension; what coverage ends in.
    """
    order = np.argsort(loads, kind="stable")
    seconds = np.full(len(loads), np.nan)
    refusal = ""
    low, high = 0, len(order)  # the first ``low`` are covered, more than ``high`` are not
    count = high
    while low < high:
        try:
            chosen = order[:count]
            seconds[chosen] = np.broadcast_to(ask(chosen).seconds, (count,))
            low = count
        except NotCovered as error:
            refusal = str(error)
            high = count - 1
        count = (low + high + 1) // 2
    return seconds, refusal
