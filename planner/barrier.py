"""The expected time of a step that waits for the slowest of several attention workers.

Each worker's context is a sum over many slots and so close to Gaussian; the step takes as long as
the largest of them needs, or as long as something else does. For the mean over many steps only;
no tails, no time series. Who asks what for is ``points``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_ndtr

from planner.errors import PlannerError

Array = NDArray[np.float64]

# Standard deviations between which a context lies. Beyond: Phi(-8.5) = 1e-17, and even of a
# million workers one exceeds 9.5 with a chance of 1e-15.
Z: Array = np.linspace(-8.5, 9.5, 1201)
_LOG_PHI = log_ndtr(Z)
_POINTS = 1001


class Slowest(NamedTuple):
    """Several times, of which a step waits for the largest.

    Args:
        times: at each ``Z``, never falling, [z], or [k, z] where they differ by system.
        workers: how many independent ones there are, [k] real numbers.
    """

    times: Array
    workers: Array


def expected_step(floor: Array, parts: Sequence[Slowest]) -> Array:
    """E[max(G, slowest of each part)].

    With one part that is mu + sigma*z it is the barrier-aware step of arXiv 2601.21351 v3,
    G + sigma * integral_{(G-mu)/sigma}^{inf} (1 - Phi(x)^n) dx. Here the integral is over time,
    G + integral_G^inf (1 - P(t)) dt with P(t) the product of Phi(z(t))^n over the parts, so that
    curves other than lines fit too, and several parts: taken as independent, which is on the long
    side.

    Args:
        floor: G, [k], what takes time anyway.
        parts: at least one.

    Returns:
        [k], in the unit of the times; within 1e-4 standard deviations.
    """
    steps = np.empty(len(floor))
    for k in range(len(floor)):
        low, high = float(floor[k]), -np.inf
        varying = []
        for times, workers in parts:
            row = times[k] if times.ndim == 2 else times
            # below its first point none is: it is later than that for sure
            low, high = max(low, float(row[0])), max(high, float(row[-1]))
            if row[-1] > row[0]:
                varying.append((row, max(float(workers[k]), 1.0)))
        if high <= low:
            steps[k] = low
            continue
        t = np.linspace(low, high, _POINTS)
        log_chance = sum(n * np.interp(t, row, _LOG_PHI) for row, n in varying)
        steps[k] = low + np.trapezoid(-np.expm1(log_chance), t)
    return steps


def distinct_holders(ffn: float, top_k: int, experts: int | None = None) -> float:
    """How many of the FFN workers hold at least one of a token's experts, on average.

    Uniform choice of ``top_k`` experts spread evenly over the workers: F*(1 - C(E-E/F, k)/C(E, k))
    (arXiv 2605.28302), or F*(1 - (1-1/F)^k) for many experts (``experts=None``).

    Raises:
        PlannerError: fewer than one worker or expert, or more chosen experts than there are.
    """
    if ffn < 1 or top_k < 1:
        raise PlannerError(f"got {ffn:g} FFN workers and top_k {top_k}, expected at least 1 each")
    if experts is None:
        return ffn * (1.0 - (1.0 - 1.0 / ffn) ** top_k)
    if experts < top_k or experts < ffn:
        raise PlannerError(
            f"{experts} experts can't give {top_k} per token over {ffn:g} FFN workers: expected "
            "at least as many experts as either"
        )
    elsewhere = experts - experts / ffn
    if elsewhere < top_k:
        return float(ffn)
    log_none = sum(math.log((elsewhere - i) / (experts - i)) for i in range(top_k))
    return ffn * (1.0 - math.exp(log_none))
