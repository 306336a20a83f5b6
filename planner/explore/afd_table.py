"""Tables of evaluated AFD configurations: which rows matter, and points of those.

A search looks at millions of rows and reports a few dozen, so only those become points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from planner.explore.afd_memory import attention_bytes, ffn_bytes, room
from planner.explore.afd_split import AfdSplit, Settings
from planner.explore.found import Found, Reach
from planner.explore.kernels.base import Array, Provenance
from planner.explore.pareto import front_indices
from planner.explore.points import Group, Mode, Point, Targets
from planner.explore.stages import Micro, Stages, micro


@dataclass(frozen=True)
class Table:
    """Configurations of one split, evaluated; arrays of one length, nan where nothing is known.

    Args:
        mode, split, replicas: of the system.
        given: batch, lanes, chunk.
        ttft, tpot: seconds.
        tpot_paper, tpot_safe: TPOT by both forms of the overlap.
        rate: output tokens per second of the system.
    """

    mode: Mode
    split: AfdSplit
    replicas: int
    given: Settings
    ttft: Array
    tpot: Array
    tpot_paper: Array
    tpot_safe: Array
    rate: Array

    @property
    def gpus(self) -> int:
        return self.replicas * self.split.gpus


@dataclass
class Hope:
    """What was found so far, and what could still matter.

    Args:
        targets: of the best.
        prune: whether anything is left out.
    """

    targets: Targets
    prune: bool = True
    reach: Reach = Reach()
    evaluated: int = 0
    best: tuple[Table, int] | None = None
    _rows: list[tuple[Table, int]] = field(default_factory=list)
    _users: Array = field(default_factory=lambda: np.zeros(0))
    _rates: Array = field(default_factory=lambda: np.zeros(0))

    def matters(self, ttft: Array, tpot: Array, rate: Array, gpus: int) -> np.ndarray:
        """Which rows could be the best, on the front, or nearer to a target than any.

        Args:
            ttft, tpot: seconds, not more than the truth.
            rate: tokens per second of the system, not less than the truth.
            gpus: of the system that they run on.
        """
        if not self.prune:
            return np.ones(len(tpot), bool)
        with np.errstate(divide="ignore", invalid="ignore"):
            users = 1.0 / tpot
        # the front falls: its first point that is as fast for the user serves the most of those
        at = np.searchsorted(self._users, users)
        beaten = np.append(self._rates, -np.inf)[at] >= rate / gpus
        could_win = (ttft <= self.targets.ttft) & (tpot <= self.targets.tpot)
        if self.best is not None:
            table, row = self.best
            could_win &= rate >= table.rate[row]
        nearer = (ttft < self.reach.ttft) | (tpot < self.reach.tpot)
        return ~beaten | could_win | nearer

    def take(self, table: Table) -> None:
        """Adds rows."""
        known = np.isfinite(table.tpot) & np.isfinite(table.ttft)
        self.evaluated += int(known.sum())
        self.reach |= Reach(uncovered=int((~known).sum()))
        if not known.any():
            return
        self.reach |= Reach(float(table.ttft[known].min()), float(table.tpot[known].min()))
        held = known & (table.ttft <= self.targets.ttft) & (table.tpot <= self.targets.tpot)
        if held.any():
            row = int(np.argmax(np.where(held, table.rate, -np.inf)))
            if self.best is None or _worth(table, row) > _worth(*self.best):
                self.best = (table, row)
        users, rates = 1.0 / table.tpot, table.rate / table.gpus
        own = front_indices(users, rates)
        rows = self._rows + [(table, row) for row in own]
        all_users = np.concatenate([self._users, users[own]])
        all_rates = np.concatenate([self._rates, rates[own]])
        kept = front_indices(all_users, all_rates)
        self._rows = [rows[i] for i in kept]
        self._users, self._rates = all_users[kept], all_rates[kept]

    def found(self, make: Callable[[Table, int], Point], missing: str = "") -> Found:
        """All of it, with points made of the rows."""
        return Found(
            None if self.best is None else make(*self.best),
            tuple(make(*row) for row in self._rows),
            self.reach | Reach(missing=missing),
            self.evaluated,
        )


def _worth(table: Table, row: int) -> tuple[float, float, float]:
    return float(table.rate[row]), -float(table.gpus), -float(table.tpot[row])


def point_of(stages: Stages, table: Table, row: int) -> Point:
    """A row with all that is to be said about it."""
    given, split = table.given, table.split
    batch, lanes, chunk = (float(x[row]) for x in (given.batch, given.lanes, given.chunk))
    work = micro(np.array([batch]), np.zeros(1), np.array([lanes]))
    stage = stages.parts(split, work, stages.attention(split.tp, work))
    parts = {name: float(x[0]) * lanes for name, x in stage.items()}
    return Point(
        mode=table.mode,
        groups=groups_of(stages, split, table.replicas, batch, batch + chunk),
        batch=int(batch),
        concurrency=table.replicas * split.dp * batch,
        ttft=float(table.ttft[row]),
        tpot=float(table.tpot[row]),
        tokens_per_s=float(table.rate[row]),
        chunk=int(chunk),
        lanes=int(lanes),
        tpot_safe=float(table.tpot_safe[row]),
        parts=parts,
        shares=shares_of(stages, split, work, parts),
        placement=stages.placement(split, float(work.tokens[0])),
    )


def groups_of(
    stages: Stages,
    split: AfdSplit,
    replicas: int,
    batch: float,
    tokens: float,
    prefix: str = "",
    length: int | None = None,
) -> tuple[Group, Group]:
    """Both sides, with their memory.

    Args:
        batch: requests that an attention rank holds.
        tokens: that it computes in a step at most.
        prefix: of the roles: "prefill ", "decode ".
        length: context of a request, tokens; none: as at its end.
    """
    question = stages.question
    requests, computed = np.array([batch]), np.array([tokens])
    attention, ffn = room(question)
    return (
        Group(
            role=f"{prefix}attention",
            replicas=replicas,
            tp=split.tp,
            dp=split.dp,
            moe_tp=1,
            ep=1,
            gpus=split.attention,
            memory=float(attention_bytes(question, split.tp, requests, computed, length)[0]),
            room=attention,
        ),
        Group(
            role=f"{prefix}ffn",
            replicas=replicas,
            tp=1,
            dp=1,
            moe_tp=split.moe_tp,
            ep=split.ep,
            gpus=split.ffn,
            memory=float(ffn_bytes(question, split, computed)[0]),
            room=ffn,
        ),
    )


def shares_of(
    stages: Stages, split: AfdSplit, work: Micro, parts: Mapping[str, float]
) -> dict[Provenance, float]:
    """Where a step's times come from; what travels is modelled, and counts as such.

    Args:
        work: one micro-batch.
        parts: seconds by stage.
    """
    tokens = split.dp * work.tokens
    sides = {
        "attention": stages.attention_time(split.tp, work.decode, work.prefill).shares(),
        "ffn": stages.experts_time(split.moe_tp, split.ep, tokens).shares(),
    }
    total = sum(parts.values())
    shares: dict[Provenance, float] = {}
    for name, seconds in parts.items():
        for source, share in sides.get(name, {Provenance.ROOFLINE: 1.0}).items():
            shares[source] = shares.get(source, 0.0) + share * seconds / total
    return shares
