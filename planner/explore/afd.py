"""AFD: attention and experts on GPUs of their own, prefill in chunks that ride with decode.

"Agg+AFD" of arXiv 2605.28302. A replica is a split (``afd_split``); its step is the overlap of four
stages (``stages``, ``overlap``); the schedule of chunks and the wait for the first token are those
of ``aggregated``. With prefill apart see ``pd_afd``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from planner.explore.afd_memory import attention_bytes, ffn_bytes, most_requests, room
from planner.explore.afd_split import AfdSplit, chunks_of, settings
from planner.explore.afd_table import AfdRows, Hope, Table
from planner.explore.aggregated import corrections_of, outcome, plan_of
from planner.explore.found import Reach
from planner.explore.stages import Stages, micro


class Rank:
    """All that is tried on an attention rank of ``tp`` GPUs: what no FFN side changes.

    Args:
        stages: of the question.
        tp: GPUs.

    Attributes:
        given: settings that fit the memory of the attention side.
        plan, fixes: their schedule of chunks, and what the engine does to it.
        mixed, plain: a micro-batch of their steps with and without prompt tokens.
        mixed_attention, plain_attention: seconds of it in attention.
        reach: what was lacking where none fits.
    """

    def __init__(self, stages: Stages, tp: int):
        question = stages.question
        shape = question.shape
        given = settings(question.options, max(1, most_requests(question, tp)), chunks_of(shape))
        # at least one slot decodes while others' prompts are computed, but for a single one
        prompts = np.ceil(given.chunk / shape.prompt)
        given = given.where(prompts <= np.maximum(given.batch - 1, 1))
        self.fixes = corrections_of(stages.db)
        tokens = plan_of(question, given.batch, given.chunk, self.fixes).decode + given.chunk
        used, allowed = attention_bytes(question, tp, given.batch, tokens), room(question)[0]
        self.reach = Reach(memory=float(used.min()), room=allowed)
        self.given = given.where(used <= allowed)
        if len(self.given):
            self.reach = Reach()
        self.plan = plan_of(question, self.given.batch, self.given.chunk, self.fixes)
        self.mixed = micro(self.plan.decode, self.given.chunk, self.given.lanes)
        self.plain = micro(self.given.batch, 0.0 * self.given.batch, self.given.lanes)
        self.mixed_attention = stages.attention(tp, self.mixed)
        self.plain_attention = stages.attention(tp, self.plain)


def evaluate(
    stages: Stages, rank: Rank, split: AfdSplit, replicas: int, hope: Hope | None = None
) -> Table | None:
    """Every setting of a rank on one split.

    Args:
        rank: of ``split.tp`` GPUs.
        replicas: of the split.
        hope: settings that it says can't matter are left out; none: nothing is.

    Returns:
        None where no setting fits memory or can matter; else the table, nan where kernels are
        unknown.
    """
    question = stages.question
    ranks = replicas * split.dp
    alone = np.ones(len(rank.given), bool)
    if hope is not None:
        # no step is shorter than attention alone
        mixed = rank.mixed.lanes * rank.mixed_attention
        plain = rank.plain.lanes * rank.plain_attention
        ttft, tpot, rate = outcome(question, rank.plan, mixed, plain, rank.fixes)
        alone = hope.matters(ttft, tpot, ranks * rate, replicas * split.gpus)
    tokens = np.maximum(rank.plan.decode + rank.given.chunk, rank.given.batch)
    used, allowed = ffn_bytes(question, split, tokens), room(question)[1]
    if hope is not None and len(used) and used.min() > allowed:
        hope.reach |= Reach(memory=float(used.min()), room=allowed)
    chosen = alone & (used <= allowed)
    if not chosen.any():
        return None
    plan = rank.plan.where(chosen)
    long = stages.step(split, rank.mixed.where(chosen), rank.mixed_attention[chosen])
    short = stages.step(split, rank.plain.where(chosen), rank.plain_attention[chosen])
    by_form = {
        "paper": outcome(question, plan, long.paper, short.paper, rank.fixes),
        "safe": outcome(question, plan, long.safe, short.safe, rank.fixes),
    }
    ttft, tpot, rate = by_form[question.options.overlap]
    return Table(
        split=split,
        replicas=replicas,
        given=rank.given.where(chosen),
        ttft=ttft,
        tpot=tpot,
        tpot_paper=by_form["paper"][1],
        tpot_safe=by_form["safe"][1],
        rate=ranks * rate,
    )


def explore_afd(
    stages: Stages,
    splits: Iterable[AfdSplit],
    gpus: int,
    *,
    prune: bool = True,
    ranks: dict[int, Rank] | None = None,
) -> AfdRows:
    """Best and front over splits of replicas.

    Args:
        splits: of any sizes; each is replicated as often as ``gpus`` allow.
        gpus: of the system.
        prune: leave out what can't be the best, on the front, or nearest to a target. The answer
            is the same.
        ranks: by ``tp``, of earlier calls with the same stages; those that lack are added.
    """
    hope = Hope(stages.question.targets, prune)
    ranks = {} if ranks is None else ranks
    for split in splits:
        if split.tp not in ranks:
            ranks[split.tp] = Rank(stages, split.tp)
        rank = ranks[split.tp]
        hope.reach |= rank.reach
        if not len(rank.given):
            continue
        table = evaluate(stages, rank, split, gpus // split.gpus, hope)
        if table is not None:
            hope.take(table)
    return hope.rows(stages.refusal)
