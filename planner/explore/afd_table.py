"""Tables of evaluated AFD configurations: which rows matter, and points of those.

A search looks at millions of rows and reports a few dozen, so only those become points.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from planner.explore.afd_memory import attention_bytes, ffn_bytes, room
from planner.explore.afd_split import AfdSplit, Settings
from planner.explore.found import NOWHERE, Found, Reach
from planner.explore.kernels.base import Array, Provenance
from planner.explore.pareto import front_indices
from planner.explore.points import Group, Mode, Point, Targets
from planner.explore.stages import Micro, Stages, micro


@dataclass(frozen=True)
class Table:
    """Configurations of one split, evaluated; arrays of one length, nan where nothing is known.

    Args:
        split, replicas: of the system.
        given: batch, lanes, chunk.
        ttft, tpot: seconds.
        tpot_paper, tpot_safe: TPOT by both forms of the overlap.
        rate: output tokens per second of the system.
    """

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


@dataclass(frozen=True)
class Row:
    """One configuration that is worth to be reported; fields as in ``Table`` and ``Point``."""

    split: tuple[int, int, int, int]
    replicas: int
    batch: int
    lanes: int
    chunk: int
    ttft: float
    tpot: float
    paper: float
    safe: float
    rate: float

    @property
    def gpus(self) -> int:
        return self.replicas * AfdSplit(*self.split).gpus


@dataclass(frozen=True)
class AfdRows:
    """What a part of the search found: ``Found`` before points are made."""

    best: Row | None = None
    front: tuple[Row, ...] = ()
    reach: Reach = NOWHERE
    evaluated: int = 0

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "best": None if self.best is None else vars(self.best),
            "front": [vars(row) for row in self.front],
            "reach": vars(self.reach),
            "evaluated": self.evaluated,
        }

    @staticmethod
    def read(data: Mapping[str, Any]) -> AfdRows:
        """What ``data`` gave."""
        return AfdRows(
            None if data["best"] is None else _read_row(data["best"]),
            tuple(_read_row(row) for row in data["front"]),
            Reach(**data["reach"]),
            data["evaluated"],
        )


def _read_row(data: Mapping[str, Any]) -> Row:
    return Row(**{**data, "split": tuple(data["split"])})


def found_of_rows(stages: Stages, parts: Iterable[AfdRows]) -> Found:
    """All parts merged, with points made of the rows."""
    parts = list(parts)
    reach = NOWHERE
    for part in parts:
        reach |= part.reach
    bests = [part.best for part in parts if part.best is not None]
    best = max(bests, key=lambda row: (row.rate, -row.gpus, -row.tpot), default=None)
    rows = [row for part in parts for row in part.front]
    kept = front_indices(
        np.array([1.0 / row.tpot for row in rows]), np.array([row.rate / row.gpus for row in rows])
    )
    return Found(
        None if best is None else point_of(stages, best),
        tuple(point_of(stages, rows[i]) for i in kept),
        reach,
        sum(part.evaluated for part in parts),
    )


@dataclass
class Hope:
    """What was found so far, and what could still matter.

    Args:
        targets: of the best.
        prune: whether anything is left out.
    """

    targets: Targets
    prune: bool = True
    reach: Reach = NOWHERE
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

    def rows(self, missing: str = "") -> AfdRows:
        """All of it, light."""
        return AfdRows(
            None if self.best is None else _row(*self.best),
            tuple(_row(*one) for one in self._rows),
            self.reach | Reach(missing=missing),
            self.evaluated,
        )


def _row(table: Table, row: int) -> Row:
    given, split = table.given, table.split
    return Row(
        split=(split.tp, split.dp, split.moe_tp, split.ep),
        replicas=table.replicas,
        batch=int(given.batch[row]),
        lanes=int(given.lanes[row]),
        chunk=int(given.chunk[row]),
        ttft=float(table.ttft[row]),
        tpot=float(table.tpot[row]),
        paper=float(table.tpot_paper[row]),
        safe=float(table.tpot_safe[row]),
        rate=float(table.rate[row]),
    )


def _worth(table: Table, row: int) -> tuple[float, float, float]:
    return float(table.rate[row]), -float(table.gpus), -float(table.tpot[row])


def point_of(stages: Stages, row: Row) -> Point:
    """A row with all that is to be said about it."""
    split = AfdSplit(*row.split)
    batch = np.array([float(row.batch)])
    work = micro(batch, 0.0 * batch, np.array([float(row.lanes)]))
    stage = stages.parts(split, work, stages.attention(split.tp, work))
    parts = {name: float(seconds[0] * work.lanes[0]) for name, seconds in stage.items()}
    return Point(
        mode=Mode.AFD,
        groups=groups_of(stages, split, row.replicas, row.batch, row.batch + row.chunk),
        batch=row.batch,
        concurrency=float(row.replicas * split.dp * row.batch),
        ttft=row.ttft,
        tpot=row.tpot,
        tokens_per_s=row.rate,
        chunk=row.chunk,
        lanes=row.lanes,
        tpot_paper=row.paper,
        tpot_safe=row.safe,
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
