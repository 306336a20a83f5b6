"""Asking a source of kernel times for many loads, of which it may cover only some."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.explore.kernels.base import Array, NotCovered, Time


def seconds_where_covered(ask: Callable[[np.ndarray], Time], count: int) -> tuple[Array, str]:
    """Seconds per load, nan where the source refuses, and one of its refusals ("" without).

    Args:
        ask: of indices of loads: the times.
        count: of the loads.
    """
    seconds = np.full(count, np.nan)
    wanted, refusal = np.arange(count), ""
    # twice at most for a source; an interpolation between two has two to ask
    for _ in range(4):
        if not len(wanted):
            break
        try:
            seconds[wanted] = np.broadcast_to(ask(wanted).seconds, len(wanted))
            break
        except NotCovered as error:
            refusal = str(error)
            if error.covered is None:
                break
            wanted = wanted[np.broadcast_to(error.covered, len(wanted))]
    return seconds, refusal
