"""The search cut into units of work: each one a process can do alone, with a result in plain data.

What the units of a question are, and what one of them finds. Running them is ``search``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from planner.explore.afd import Rank, explore_afd
from planner.explore.afd_split import AfdSplit, replica_sizes, splits_of
from planner.explore.afd_table import AfdRows, found_of_rows
from planner.explore.aggregated import explore_aggregated
from planner.explore.found import Found, merged
from planner.explore.kernels.base import KernelDB
from planner.explore.pd import describe_plain, plain_pools
from planner.explore.pd_afd import ROLES, PoolRank, Role, afd_replicas, describe_afd
from planner.explore.points import Mode
from planner.explore.pools import (
    Details,
    Pools,
    Replica,
    decodes_that_matter,
    found_of,
    merged_pools,
    pool_sizes,
    prefills_that_matter,
)
from planner.explore.question import Question
from planner.explore.split import Split, replica_gpus, splits
from planner.explore.stages import Stages
from planner.explore.whole import Steps

SPLITS_PER_UNIT = 150
"""AFD splits in a unit: seconds of work, so that two processes end together."""


@dataclass(frozen=True)
class Unit:
    """A part of the search.

    Args:
        kind: "aggregated", "afd", "plain pools", "afd pools".
        size: GPUs of a replica; 0: all sizes.
        part, parts: every ``parts``-th split from ``part`` on.
    """

    kind: str
    size: int = 0
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        """For people, and unique within a search."""
        size = f", replicas of {self.size} GPUs" if self.size else ""
        return f"{self.kind}{size}" + (f", {self.part + 1}/{self.parts}" if self.parts > 1 else "")


@dataclass(frozen=True)
class Setup:
    """What every unit of a search shares.

    Args:
        question: that is asked.
        db, ffn_db: kernel times.
        prune: leave out what can't matter.
    """

    question: Question
    db: KernelDB
    ffn_db: KernelDB
    prune: bool = True


def units_of(question: Question) -> list[Unit]:
    """All of a question, the largest first."""
    modes, gpus = question.modes, question.gpus
    units: list[Unit] = []
    if Mode.AFD in modes:
        units += _afd_units(question, "afd", replica_sizes(gpus))
    if Mode.PD_AFD in modes:
        sizes = [size for size in pool_sizes(gpus, question.system.node) if size > 1]
        units += _afd_units(question, "afd pools", sizes)
    if Mode.PD in modes or (Mode.PD_AFD in modes and question.options.pd_afd == "any"):
        units += [Unit("plain pools")]
    if Mode.AGGREGATED in modes:
        units += [Unit("aggregated")]
    return units


def _afd_units(question: Question, kind: str, sizes: list[int]) -> Iterator[Unit]:
    for size in sorted(sizes, reverse=True):
        parts = -(-len(_splits(question, size)) // SPLITS_PER_UNIT)
        for part in range(parts):
            yield Unit(kind, size, part, parts)


def _splits(question: Question, size: int) -> list[AfdSplit]:
    ffn_system = question.ffn_system or question.system
    return list(splits_of(question.model, size, question.system, ffn_system))


class Worker:
    """Does units of one search, remembering what they have in common.

    Args:
        setup: of the search.
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._question = setup.question
        self._stages = Stages(setup.question, setup.db, setup.ffn_db)
        self._steps = Steps(setup.question, setup.db)
        self._ranks: dict[int, Rank] = {}
        self._details: dict[tuple[Replica, str], Details] = {}
        self._pool_ranks: dict[Role, dict[int, PoolRank]] = {role: {} for role in ROLES}

    def work(self, unit: Unit) -> dict[str, Any]:
        """What a unit finds, as plain data."""
        if unit.kind == "aggregated":
            return self._aggregated()
        if unit.kind == "plain pools":
            return self._plain_pools()
        splits = _splits(self._question, unit.size)[unit.part :: unit.parts]
        prune = self._setup.prune
        if unit.kind == "afd":
            gpus = self._question.gpus
            return explore_afd(self._stages, splits, gpus, prune=prune, ranks=self._ranks).data()
        return merged_pools(
            afd_replicas(self._stages, splits, role, prune=prune, ranks=self._pool_ranks[role])
            for role in ROLES
        ).data()

    def _aggregated(self) -> dict[str, Any]:
        return explore_aggregated(
            self._question, self._setup.db, self._whole_splits(), self._steps
        ).data()

    def _plain_pools(self) -> dict[str, Any]:
        pools = plain_pools(self._question, self._setup.db, self._whole_splits(), self._steps)
        return replace(
            pools,
            prefills=tuple(prefills_that_matter(self._question, pools.prefills)),
            decodes=tuple(decodes_that_matter(pools.decodes)),
        ).data()

    def _whole_splits(self) -> list[Split]:
        """Of replicas whose GPUs do both sides."""
        model, node = self._question.model, self._question.system.node
        sizes = replica_gpus(self._question.gpus)
        return [split for size in sizes for split in splits(model, size, node)]

    def found(self, mode: Mode, results: Mapping[Unit, Mapping[str, Any]]) -> Found:
        """What all units together found for a mode."""
        if mode is Mode.AGGREGATED:
            return merged(Found.read(d) for unit, d in results.items() if unit.kind == "aggregated")
        if mode is Mode.AFD:
            rows = (AfdRows.read(d) for unit, d in results.items() if unit.kind == "afd")
            return found_of_rows(self._stages, rows)
        kinds = {"afd pools"} if mode is Mode.PD_AFD else {"plain pools"}
        if self._question.options.pd_afd == "any":
            kinds |= {"plain pools"}
        pools = merged_pools(
            Pools.read(data) for unit, data in results.items() if unit.kind in kinds
        )
        return found_of(self._question, mode, pools, self._describe)

    def _describe(self, replica: Replica, role: str) -> Details:
        if (replica, role) not in self._details:
            self._details[replica, role] = (
                describe_afd(self._stages, replica, role)
                if replica.afd
                else describe_plain(self._steps, replica, role)
            )
        return self._details[replica, role]
