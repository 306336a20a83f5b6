"""How long a decode step of AFD takes when its micro-batches overlap.

A micro-batch goes through four stages per layer, {attention, A2F, FFN, F2A}; while one is at a
stage, others are at the other three. Formulas only: what a stage takes is the business of kernels
and network, and what really happens with whole micro-batches is ``check``'s, by discrete events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import PlannerError
from planner.explore.kernels.base import Array

FULL_DUPLEX_LANES, HALF_DUPLEX_LANES = 4, 3


@dataclass(frozen=True)
class Overlapped:
    """Seconds of a step, in which every micro-batch gets one token; shape of the stages.

    Args:
        paper: M * s_max + sum of the others' s_i / L, arXiv 2605.28302.
        safe: the same, but never less than one micro-batch's own passage, sum of s_i: what it
            can't be faster than, whatever the others do.
    """

    paper: Array
    safe: Array


def overlapped(stages: Sequence[ArrayLike], lanes: ArrayLike, layers: int) -> Overlapped:
    """The step's time from its stages'.

    The slowest stage serves M micro-batches one after the other in every layer; the others show
    only once, while the pipeline fills, which is a layer's worth of each (arXiv 2605.28302). That
    is too little where M * s_max < sum s_i: then the stages aren't kept busy, and a micro-batch's
    own passage counts.

    Args:
        stages: seconds of one micro-batch at each stage, summed over all layers; they broadcast.
        lanes: M, micro-batches; broadcasts.
        layers: L, of the model.

    Raises:
        PlannerError: no stages, fewer than one layer or lane, or a negative time.
    """
    if not stages:
        raise PlannerError("no stages are given; expected the seconds of each")
    least = np.min(lanes)
    if layers < 1 or least < 1:
        raise PlannerError(f"layers is {layers}, lanes {least}; expected at least 1 of each")
    times = np.stack(np.broadcast_arrays(*(np.asarray(stage, float) for stage in stages)))
    if np.any(times < 0):
        raise PlannerError("a stage takes less than no time; expected seconds >= 0")
    total, slowest = times.sum(axis=0), times.max(axis=0)
    paper = np.asarray(lanes) * slowest + (total - slowest) / layers
    return Overlapped(paper, np.maximum(paper, total))


def micro_batches(batch: Array, lanes: int) -> tuple[Array, Array]:
    """How a rank's batch is cut: (micro-batches, requests in the largest of them).

    There are no more micro-batches than requests (arXiv 2605.28302).

    Args:
        batch: requests of one attention rank, >= 1.
        lanes: micro-batches wanted.
    """
    count = np.minimum(batch, lanes)
    return count, np.ceil(batch / count)
