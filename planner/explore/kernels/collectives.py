"""Collectives within one replica, by latency and bandwidth of the system's tiers.

For the roofline only: even traffic, nobody else on the links. What attention and FFN groups send
each other, with fan-out and contention, is ``planner.explore.network``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from planner.explore.kernels.base import Array
from planner.explore.system import System


def all_reduce(system: System, gpus: int, size: ArrayLike) -> Array:
    """Seconds of a sum of ``size`` bytes over ``gpus`` GPUs: tier by tier, innermost first.

    Within n members a ring moves 2 (n-1)/n of the bytes; a tier further out moves only the part
    that each member of the inner one holds.
    """
    size = np.asarray(size, float)
    seconds, inner = np.zeros_like(size), 1
    for tier in system.tiers:
        reach = gpus if tier.gpus is None else min(tier.gpus, gpus)
        members = -(-reach // inner)
        if members > 1:
            moved = 2 * (members - 1) / members * size / inner
            seconds = seconds + np.where(size > 0, tier.latency + moved / tier.bandwidth, 0.0)
        inner = max(inner, reach)
    return seconds


def all_to_all(system: System, gpus: int, size: ArrayLike) -> Array:
    """Seconds until every one of ``gpus`` GPUs has sent ``size`` bytes evenly to all of them.

    Tiers work at the same time; the slowest counts. What goes to the GPU itself is free.
    """
    size = np.asarray(size, float)
    seconds, inner = np.zeros_like(size), 1
    for tier in system.tiers:
        reach = gpus if tier.gpus is None else min(tier.gpus, gpus)
        share = (reach - inner) / gpus
        if share > 0:
            moved = share * size / tier.bandwidth
            seconds = np.maximum(seconds, np.where(size > 0, tier.latency + moved, 0.0))
        inner = max(inner, reach)
    return seconds
