"""AFD of one attention and one FFN process beside one process that does both on the same two cores.

Decode steps predicted from kernels measured on the machine (``MeasuredDB``), each side by itself:
what they take together is the overlap formula's and a sum's business. Not for clusters: see
``search``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from planner.errors import PlannerError
from planner.explore.kernels.base import Load, Provenance, Sides, Time
from planner.explore.kernels.measured import MeasuredDB
from planner.explore.model import Model
from planner.explore.overlap import overlapped

MOST_LANES, LEAST_PER_LANE, LANE_MARGIN = 4, 4, 0.03
"""As the runtime's lane chooser: fewer lanes win unless more save this share of a layer."""


@dataclass(frozen=True)
class Step:
    """A predicted decode step.

    Args:
        seconds: of it.
        lanes: micro-batches; 1 for aggregation.
        parts: seconds of one micro-batch by stage, and of what comes once per step.
        shares: of the parts by provenance.
    """

    seconds: float
    lanes: int
    parts: Mapping[str, float]
    shares: Mapping[Provenance, float]


@dataclass(frozen=True)
class Comparison:
    """Both ways at one setting.

    Args:
        batch: requests that decode.
        afd, aggregated: their steps.
    """

    batch: int
    afd: Step
    aggregated: Step

    @property
    def afd_rate(self) -> float:
        """Tokens per second."""
        return self.batch / self.afd.seconds

    @property
    def aggregated_rate(self) -> float:
        """Tokens per second."""
        return self.batch / self.aggregated.seconds

    @property
    def winner(self) -> str:
        """ "afd" or "aggregated"."""
        return "afd" if self.afd_rate > self.aggregated_rate else "aggregated"


def compare(db: MeasuredDB, model: Model, batch: int, context: float) -> Comparison:
    """Predicted steps of both ways.

    Args:
        context: mean tokens of a request.

    Raises:
        NotCovered: the setting is outside of what was measured.
        PlannerError: no requests.
    """
    if batch < 1:
        raise PlannerError(f"batch is {batch}, expected at least 1 request")
    return Comparison(batch, afd_step(db, model, batch, context), aggregated_step(
        db, model, batch, context
    ))  # fmt: skip


def aggregated_step(db: MeasuredDB, model: Model, batch: int, context: float) -> Step:
    """One process with two threads, attention and experts one after the other."""
    load = _load(batch, context)
    parts = {
        "attention": db.attention(model, 2, Sides(), load),
        "ffn": db.experts(model, 2, 1, Sides(), load.tokens),
    }
    return _step(sum(_seconds(part) for part in parts.values()), 1, parts)


def afd_step(db: MeasuredDB, model: Model, batch: int, context: float) -> Step:
    """One thread for each side, with the number of lanes that the runtime would choose."""
    most = max(1, min(MOST_LANES, batch // LEAST_PER_LANE))
    chosen, chosen_layers = 1, np.inf
    for lanes in range(1, most + 1):
        taken = _layers(_stages(db, model, batch, context, lanes), lanes)
        if taken < chosen_layers * (1 - (LANE_MARGIN if lanes > 1 else 0)):
            chosen, chosen_layers = lanes, taken
    stages = _stages(db, model, batch, context, chosen)
    outside = db.outside(model, 1, _load(batch, context))
    times = [_seconds(stage) for stage in stages.values()]
    together = float(overlapped(times, chosen, model.layers).safe)
    return _step(_seconds(outside) + together, chosen, stages | {"outside": outside})


def _stages(
    db: MeasuredDB, model: Model, batch: int, context: float, lanes: int
) -> dict[str, Time]:
    """One micro-batch, the largest, through all layers; the wire's time is half on each way."""
    load = _load(-(-batch // lanes), context)
    hop = db.hop(model, load.tokens)
    way = Time({how: part / 2 for how, part in hop.wire.parts.items()})
    return {
        "attention": db.layers(model, 1, Sides(), load) + hop.attention,
        "a2f": way,
        "ffn": db.experts(model, 1, 1, Sides(), load.tokens) + hop.ffn,
        "f2a": way,
    }


def _layers(stages: Mapping[str, Time], lanes: int) -> float:
    """Seconds of all layers as the runtime's chooser sees them: no pipeline to fill."""
    times = [_seconds(stage) for stage in stages.values()]
    return max(lanes * max(times), sum(times))


def _load(batch: int, context: float) -> Load:
    return Load(decode=np.array([float(batch)]), context=np.array([float(context)]))


def _seconds(time: Time) -> float:
    return float(np.sum(time.seconds))


def _step(seconds: float, lanes: int, parts: Mapping[str, Time]) -> Step:
    total = Time({})
    for part in parts.values():
        total = total + part
    named = {name: _seconds(part) for name, part in parts.items()}
    return Step(seconds, lanes, named, total.shares())
