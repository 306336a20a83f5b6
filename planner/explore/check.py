"""Decode of an AFD point by discrete events, beside the formulas of its overlap.

``planner.simulator`` runs the micro-batches through attention, transfer and FFN layer by layer,
with contexts that grow and differ between requests; the formulas know only means. Decode alone:
chunks of prompts aren't simulated. For the few points that are reported, not for a search.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.curves import PiecewiseLinear
from planner.errors import PlannerError
from planner.explore.afd_split import AfdSplit
from planner.explore.kernels.base import Array, KernelDB, Load
from planner.explore.overlap import overlapped
from planner.explore.points import Point
from planner.explore.question import Question
from planner.explore.stages import Micro, Stages, micro
from planner.latency import Latencies
from planner.lengths import Fixed
from planner.loads import Closed
from planner.pairs import Independent
from planner.simulator import Cluster, simulate

MOST_RANKS = 8
"""Attention ranks that are simulated: more of the same only wait for one another."""
STEPS = 12
"""Of every micro-batch."""


@dataclass(frozen=True)
class Simulated:
    """Decode of one AFD point, full batch.

    Args:
        tpot: seconds between two tokens of a request, simulated.
        tokens_per_s: of the whole system, simulated.
        paper, safe: TPOT by both forms of the overlap, the same work.
        ranks: attention ranks that were simulated, of those there are.
    """

    tpot: float
    tokens_per_s: float
    paper: float
    safe: float
    ranks: int


def simulate_point(
    question: Question, point: Point, db: KernelDB, ffn_db: KernelDB | None = None, *, seed: int = 0
) -> Simulated:
    """Runs the decode of a point.

    Raises:
        PlannerError: its decode isn't AFD.
        NotCovered: kernels are unknown for contexts that come up.
    """
    split, replicas = afd_of(point)
    stages = Stages(question, db, ffn_db)
    work = micro(np.array([float(point.batch)]), np.zeros(1), np.array([float(point.lanes)]))
    size, lanes = int(work.decode[0]), int(work.lanes[0])
    ranks = min(split.dp, MOST_RANKS)
    parts = stages.parts(split, work, stages.attention(split.tp, work))
    formula = overlapped(list(parts.values()), lanes, question.model.layers)
    safe = float(formula.safe[0])
    result = simulate(
        Cluster(
            latencies=_latencies(stages, split, work, ranks),
            attention=ranks,
            batch=size,
            lanes=lanes,
            layers=question.model.layers,
        ),
        Closed(_lengths(question), None, stationary=True),
        seed=seed,
        until=STEPS * safe,
    )
    share = point.batch / (size * lanes)  # of the slots that the largest micro-batches have
    whole = replicas * split.dp / ranks
    return Simulated(
        tpot=result.step_time,
        tokens_per_s=size * lanes * ranks / result.step_time * whole * share,
        paper=float(formula.paper[0]),
        safe=safe,
        ranks=ranks,
    )


def afd_of(point: Point) -> tuple[AfdSplit, int]:
    """The split of a point's decode, and its replicas.

    Raises:
        PlannerError: attention and experts aren't apart in it.
    """
    sides = {group.role.removeprefix("decode "): group for group in point.groups}
    if not {"attention", "ffn"} <= set(sides):
        raise PlannerError(
            f"decode of the {point.mode} point isn't AFD: expected attention and ffn GPUs"
        )
    one, other = sides["attention"], sides["ffn"]
    return AfdSplit(one.tp, one.dp, other.moe_tp, other.ep), one.replicas


def _lengths(question: Question) -> Independent:
    shape = question.shape
    return Independent(Fixed(shape.prefix + shape.prompt), Fixed(shape.output))


def _latencies(stages: Stages, split: AfdSplit, work: Micro, ranks: int) -> Latencies:
    """Stage times of a full micro-batch; the FFN side is one worker for all ranks."""
    shape, model = stages.question.shape, stages.model
    size = float(work.decode[0])
    contexts = np.linspace(shape.prefix + shape.prompt, shape.longest + 1, 5)
    load = Load(decode=np.full_like(contexts, size), context=contexts)
    attention = stages.db.attention(model, split.tp, stages.question.options.sides, load).seconds
    there, back = stages.transfers(split, work.tokens)
    requests = np.array([0.5, 1.0]) * ranks * size
    ffn = stages.experts(split.moe_tp, split.ep, requests * split.dp / ranks)
    across = float(there[0] + back[0])
    return Latencies(
        attention=_curve(size * contexts, attention),
        ffn=_curve(requests, ffn),
        transfer=_curve(np.array([0.0, size]), np.array([across, across])),
        transfer_load="attention",
        source=stages.db.name,
    )


def _curve(loads: Array, seconds: Array) -> PiecewiseLinear:
    rising = np.maximum.accumulate(seconds)
    return PiecewiseLinear(tuple(zip(loads.tolist(), rising.tolist(), strict=True)))
