"""P/D with AFD: prefill and decode in pools of their own, attention and experts apart in one or both.

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
from planner.explore.pools import Replica
from planner.explore.stages import Stages, micro

Role = Literal["prefill", "decode"]

MOST_PROMPTS = 32
"""Prompts that an attention rank computes at once: no more are tried."""


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
        prompt = question.shape.prompt
        most, allowed = max(1, most_requests(question, tp)), room(question)[0]
        given = settings(question.options, most, [0])
        if role == "prefill":
            given = _prompts(min(most, MOST_PROMPTS), lanes_of(question.options))
        tokens = given.batch * (prompt if role == "prefill" else 1)
        used = attention_bytes(question, tp, given.batch, tokens)
        fits = used <= allowed
        self.reach = Reach() if fits.any() else Reach(memory=float(used.min()), room=allowed)
        self.given, self.tokens = given.where(fits), tokens[fits]
        none = 0.0 * self.tokens
        loads = (none, self.tokens) if role == "prefill" else (self.tokens, none)
        self.work = micro(*loads, self.given.lanes)
        self.attention = stages.attention(tp, self.work)
        self._steps = 1 if role == "prefill" else question.shape.output

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
    columns: Array = field(default_factory=lambda: np.zeros((3, 0)))  # speed, rate, safe seconds

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
    stages: Stages, splits: Iterable[AfdSplit], role: Role, *, prune: bool = True
) -> tuple[list[Replica], Reach, int]:
    """Replicas of a pool: those that none of as many GPUs beats in both time and rate.

    Args:
        splits: of any sizes.
        role: of the pool.
        prune: leave out what can't be among them; the answer is the same.

    Returns:
        replicas; how near they came, TTFT of prefill before any factor; configurations timed.
    """
    ranks: dict[int, PoolRank] = {}
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
        columns = np.stack([1.0 / seconds, split.dp * rank.rate(seconds, rows), step.safe])
        front.take(split, rows, columns)
    found = [
        _replica(stages, ranks[split.tp], role, split, row, column)
        for front in fronts.values()
        for (split, row), column in zip(front.splits, front.columns.T, strict=True)
    ]
    return found, reach | Reach(missing=stages.refusal), evaluated


def _replica(
    stages: Stages, rank: PoolRank, role: Role, split: AfdSplit, row: int, column: Array
) -> Replica:
    work = rank.work.where(np.array([row]))
    batch, lanes = float(rank.given.batch[row]), float(work.lanes[0])
    stage = stages.parts(split, work, rank.attention[row : row + 1])
    parts = {name: float(seconds[0]) * lanes for name, seconds in stage.items()}
    decode = role == "decode"
    return Replica(
        groups=groups_of(stages, split, 1, batch, float(rank.tokens[row]), f"{role} "),
        seconds=float(1.0 / column[0]),
        requests_per_s=float(column[1]),
        batch=int(batch),
        lanes=int(lanes),
        concurrency=split.dp * batch if decode else 0.0,
        safe=float(column[2]),
        parts=parts,
        shares=shares_of(stages, split, work, parts),
        placement=stages.placement(split, float(work.tokens[0])).name,
    )


def _prompts(most: int, lanes: tuple[int, ...]) -> Settings:
    """Batches of whole prompts, each cut into every number of micro-batches."""
    rows = [(n, m, 0) for n in sizes_up_to(most) for m in lanes]
    return Settings(*np.array(rows, float).T)
