"""P/D with AFD: prefill and decode in pools, attention and experts apart in one or both.

"P/D+AFD" of arXiv 2605.28302. This makes the AFD replicas of either pool; plain ones come from
``pd``, and ``pools`` matches them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.explore.afd_memory import attention_bytes, ffn_bytes, most_requests, room
from planner.explore.afd_split import AfdSplit, Settings, lanes_of, settings, sizes_up_to
from planner.explore.afd_table import groups_of, shares_of
from planner.explore.found import Reach
from planner.explore.kernels.base import Array
from planner.explore.pareto import front_indices
from planner.explore.pd import MOST_PROMPT_TOKENS
from planner.explore.pools import Details, Pools, Replica
from planner.explore.stages import Stages, micro

Role = Literal["prefill", "decode"]
ROLES: tuple[Role, ...] = ("prefill", "decode")


class PoolRank:
    """What is tried on an attention rank of a pool: what no FFN side changes.

    Args:
        stages: of the question.
        tp: GPUs of the rank.
        role: "prefill": a step is a batch of whole prompts; "decode": a token of each request.

    Attributes:
        given: settings that fit the memory of the attention side.
        tokens: that the rank computes in a step.
        work, attention: a micro-batch, and its seconds in attention.
        reach: what was lacking where none fits.
    """

    def __init__(self, stages: Stages, tp: int, role: Role):
        question = stages.question
        shape, allowed = question.shape, room(question)[0]
        if role == "prefill":
            most = max(1, MOST_PROMPT_TOKENS // shape.prompt)
            given = _prompts(most, lanes_of(question.options))
        else:
            given = settings(question.options, max(1, most_requests(question, tp)), [0])
        tokens = given.batch * (shape.prompt if role == "prefill" else 1)
        used = attention_bytes(question, tp, given.batch, tokens, _length(stages, role))
        fits = used <= allowed
        self.reach = Reach() if fits.any() else Reach(memory=float(used.min()), room=allowed)
        self.given, self.tokens = given.where(fits), tokens[fits]
        none = 0.0 * self.tokens
        decode, prompts = (none, self.tokens) if role == "prefill" else (self.tokens, none)
        self.work = micro(decode, prompts, self.given.lanes)
        self.attention = stages.attention(tp, self.work)
        # the first token comes with the prompt
        self._steps = 1 if role == "prefill" else max(shape.output - 1, 1)

    def rate(self, seconds: Array, rows: np.ndarray | None = None) -> Array:
        """Requests per second of the rank where its steps take ``seconds``.

        Args:
            rows: of the settings that these are; none: all.
        """
        batch = self.given.batch if rows is None else self.given.batch[rows]
        return batch / (seconds * self._steps)


@dataclass
class _Front:
    """The replicas of one size that none beats in time and rate."""

    splits: list[tuple[AfdSplit, int]] = field(default_factory=list)
    columns: Array = field(default_factory=lambda: np.zeros((4, 0)))
    """Speed, rate, seconds by the paper's formula, by the safe bound."""

    def matters(self, floor: Array, ceiling: Array) -> np.ndarray:
        """Rows that could be on it; times not more, rates not less than the truth."""
        at = np.searchsorted(self.columns[0], 1.0 / floor)
        return np.append(self.columns[1], -np.inf)[at] < ceiling

    def take(self, split: AfdSplit, rows: np.ndarray, columns: Array) -> None:
        splits = self.splits + [(split, int(row)) for row in rows]
        together = np.concatenate([self.columns, columns], axis=1)
        kept = front_indices(together[0], together[1])
        self.splits, self.columns = [splits[i] for i in kept], together[:, kept]


def afd_replicas(
    stages: Stages,
    splits: Iterable[AfdSplit],
    role: Role,
    *,
    prune: bool = True,
    ranks: dict[int, PoolRank] | None = None,
) -> Pools:
    """Replicas of a pool: those that none of as many GPUs beats in both time and rate.

    Args:
        splits: of any sizes.
        role: of the pool.
        prune: leave out what can't be among them; the answer is the same.
        ranks: by ``tp``, of earlier calls with the same stages and role; those that lack are added.

    Returns:
        pools with replicas of that role only.
    """
    ranks = {} if ranks is None else ranks
    fronts: dict[int, _Front] = {}
    reach, evaluated = Reach(), 0
    for split in splits:
        if split.tp not in ranks:
            ranks[split.tp] = PoolRank(stages, split.tp, role)
        rank = ranks[split.tp]
        reach |= rank.reach
        if not len(rank.given):
            continue
        used, allowed = ffn_bytes(stages.question, split, rank.tokens), room(stages.question)[1]
        chosen = used <= allowed
        if not chosen.any():
            reach |= Reach(memory=float(used.min()), room=allowed)
        front = fronts.setdefault(split.gpus, _Front())
        if prune:
            # no step is shorter than attention alone
            floor = rank.work.lanes * rank.attention
            chosen &= front.matters(floor, split.dp * rank.rate(floor))
        rows = np.flatnonzero(chosen)
        if not len(rows):
            continue
        step = stages.step(split, rank.work.where(rows), rank.attention[rows])
        seconds = getattr(step, stages.question.options.overlap)
        known = np.isfinite(seconds)
        evaluated += int(known.sum())
        reach |= Reach(uncovered=int((~known).sum()))
        if not known.any():
            continue
        least = float(seconds[known].min())
        reach |= Reach(ttft=least) if role == "prefill" else Reach(tpot=least)
        rates = split.dp * rank.rate(seconds, rows)
        columns = np.stack([1.0 / seconds, rates, step.paper, step.safe])
        front.take(split, rows, columns)
    found = tuple(
        _replica(ranks[split.tp], split, row, column)
        for front in fronts.values()
        for (split, row), column in zip(front.splits, front.columns.T, strict=True)
    )
    reach |= Reach(missing=stages.refusal)
    if role == "prefill":
        return Pools(prefills=found, reach=reach, evaluated=evaluated)
    return Pools(decodes=found, reach=reach, evaluated=evaluated)


def describe_afd(stages: Stages, replica: Replica, role: str) -> Details:
    """What is to be said of an AFD replica.

    Args:
        role: "prefill" or "decode".
    """
    split = AfdSplit(*replica.split)
    batch, lanes = np.array([float(replica.batch)]), np.array([float(replica.lanes)])
    tokens = batch * (stages.question.shape.prompt if role == "prefill" else 1)
    none = 0.0 * tokens
    work = micro(none, tokens, lanes) if role == "prefill" else micro(tokens, none, lanes)
    stage = stages.parts(split, work, stages.attention(split.tp, work))
    parts = {name: float(seconds[0] * work.lanes[0]) for name, seconds in stage.items()}
    return Details(
        groups=groups_of(
            stages, split, 1, float(batch[0]), float(tokens[0]), f"{role} ", _length(stages, role)
        ),
        parts=parts,
        shares=shares_of(stages, split, work, parts),
        placement=stages.placement(split, float(work.tokens[0])),
    )


def _replica(rank: PoolRank, split: AfdSplit, row: int, column: Array) -> Replica:
    return Replica(
        split=(split.tp, split.dp, split.moe_tp, split.ep),
        gpus=split.gpus,
        seconds=float(1.0 / column[0]),
        requests_per_s=float(column[1]),
        batch=int(rank.given.batch[row]),
        lanes=int(rank.work.lanes[row]),
        afd=True,
        paper=float(column[2]),
        safe=float(column[3]),
    )


def _length(stages: Stages, role: str) -> int:
    """Context that a request's KV cache grows to in a pool, tokens."""
    shape = stages.question.shape
    return shape.prefix + shape.prompt if role == "prefill" else shape.longest


def _prompts(most: int, lanes: tuple[int, ...]) -> Settings:
    """Batches of whole prompts, each cut into every number of micro-batches."""
    rows = [(n, m, 0) for n in sizes_up_to(most) for m in lanes]
    return Settings(*np.array(rows, float).T)
