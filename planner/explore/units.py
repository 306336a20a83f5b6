"""The search cut into units of work: each one a process can do alone, with a result in plain data.

What the units of a question are, and what one of them finds. Running them is ``search``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from planner.explore.afd import explore_afd
from planner.explore.afd_split import AfdSplit, replica_sizes, splits_of
from planner.explore.found import Found, Reach, merged
from planner.explore.kernels.base import KernelDB
from planner.explore.pd_afd import afd_replicas
from planner.explore.points import Mode
from planner.explore.pools import Replica, found_of, pool_sizes
from planner.explore.question import Question
from planner.explore.stages import Stages

SPLITS_PER_UNIT = 150
"""AFD splits in a unit: seconds of work, so that two processes end together."""


@dataclass(frozen=True)
class Unit:
    """A part of the search.

    Args:
        kind: "aggregated", "pd", "afd", "prefill", "decode" (of plain pools), "afd prefill",
            "afd decode".
        size: GPUs of a replica; 0: all sizes.
        part, parts: every ``parts``-th split from ``part`` on.
    """

    kind: str
    size: int = 0
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        return f"{self.kind} {self.size} {self.part}/{self.parts}"


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
        units += _afd_units(question, "afd decode", sizes)
        units += _afd_units(question, "afd prefill", sizes)
    if Mode.PD_AFD in modes or Mode.PD in modes:
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


def work(setup: Setup, stages: Stages, unit: Unit) -> Any:
    """What a unit finds, as plain data."""
    question = setup.question
    splits = _splits(question, unit.size)[unit.part :: unit.parts]
    if unit.kind == "afd":
        return explore_afd(stages, splits, question.gpus, prune=setup.prune).data()
    role = "prefill" if unit.kind == "afd prefill" else "decode"
    replicas, reach, evaluated = afd_replicas(stages, splits, role, prune=setup.prune)
    return {
        "replicas": [one.data() for one in replicas],
        "reach": vars(reach),
        "evaluated": evaluated,
    }
