"""Figure 2 of arXiv 2605.28302 beside ours, and which inputs make the difference.

Searches under several conventions, every input of the paper's moved alone, and the throughput end
for three models. Nothing is fitted: where we don't meet the paper, the table says so. Figures and
conventions are in ``paper_2605``, text in ``reproduce_text``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from planner.explore.kernels.base import KernelDB
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.model import read_model
from planner.explore.paper_2605 import (
    FIGURE_2,
    GPUS,
    MODEL,
    MODELS,
    OURS,
    PAPER,
    ROOFLINE,
    SYSTEM,
    WORKLOADS,
    Convention,
    moves,
)
from planner.explore.points import SHAPES, Mode, Point
from planner.explore.question import Question
from planner.explore.reproduce_cells import Cell, cell_data
from planner.explore.scaled import Scaled
from planner.explore.search import explore
from planner.explore.system import System, find_system, with_network

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Task:
    """One search.

    Args:
        convention: how.
        workload, model: what.
        modes: compared.
        gpus: of the system.
    """

    convention: Convention
    workload: str
    model: str = MODEL
    modes: tuple[Mode, ...] = tuple(Mode)
    gpus: int = GPUS


@dataclass(frozen=True)
class Outcome:
    """Everything that was computed.

    Args:
        cells: of Figure 2, by convention: OURS, PAPER, ROOFLINE.
        account: cells with one input of PAPER moved; empty where it wasn't asked for.
        ends: cells of the throughput end, all models, OURS.
        source: of the measured kernels.
    """

    cells: tuple[Cell, ...]
    account: tuple[Cell, ...]
    ends: tuple[Cell, ...]
    source: str

    def of(self, convention: str) -> list[Cell]:
        """Cells of one convention, of Figure 2 or the account."""
        return [cell for cell in self.cells + self.account if cell.convention == convention]

    def summary(self) -> dict[str, float]:
        """By our default conventions, and how many are right by each of the others.

        An infeasible cell is right where ours is infeasible too. A feasible one that ours isn't
        has an error of 1.
        """
        ours = self.of(OURS.name)
        found: dict[str, float] = {
            "infeasible_cells_right": sum(c.right for c in ours if c.theirs is None),
            "feasible_max_error": max(abs(c.error) for c in ours if c.theirs is not None),
            "cells": len(ours),
        }
        for name, key in ((PAPER.name, "paper"), (ROOFLINE.name, "paper_roofline")):
            cells = self.of(name)
            found[f"infeasible_cells_right_{key}"] = sum(c.right for c in cells if c.theirs is None)
            found[f"feasible_max_error_{key}"] = max(
                abs(c.error) for c in cells if c.theirs is not None
            )
        return found

    def details(self) -> dict[str, Any]:
        """Every cell as plain data."""
        return {
            "source": self.source,
            "figure_2": [cell_data(cell) for cell in self.cells],
            "account": [cell_data(cell) for cell in self.account],
            "throughput_end": [cell_data(cell) for cell in self.ends],
        }

    def lines(self) -> list[str]:
        """For people."""
        from planner.explore.reproduce_text import lines

        return lines(self)


def reproduce(
    *, jobs: int | None = None, progress: Progress | None = None, account: bool = True
) -> Outcome:
    """Computes Figure 2 and what explains the difference: about fifty searches.

    Args:
        jobs: processes, each with searches of its own; None: one per core.
        progress: is told what was just done, and the share of all.
        account: move every input of the paper's conventions alone, too.

    Raises:
        PlannerError: the measured kernels aren't installed.
    """
    tasks = list(tasks_of(account))
    answers = dict(_answers(tasks, jobs, progress))
    names = {convention.name for convention in (OURS, PAPER, ROOFLINE)}
    own = [task for task in tasks if task.model == MODEL]
    figure = [c for t in own if t.convention.name in names for c in answers[t]]
    moved = [c for t in own if t.convention.name not in names for c in answers[t]]
    ends = [c for t in tasks if t.convention == OURS for c in answers[t]]
    return Outcome(tuple(figure), tuple(moved), tuple(ends), source_of(PAPER).name)


def tasks_of(account: bool) -> Iterator[Task]:
    """All searches."""
    for convention in (OURS, PAPER, ROOFLINE):
        for workload in WORKLOADS:
            yield Task(convention, workload)
    for model in MODELS[1:]:
        for workload in WORKLOADS:
            yield Task(OURS, workload, model)
    for moved in moves(PAPER) if account else ():
        for workload in WORKLOADS:
            yield Task(moved, workload)


def cells_of(task: Task, db: KernelDB) -> list[Cell]:
    """One search, as cells."""
    shape, targets = SHAPES[task.workload]
    question = Question(
        model=read_model(task.model),
        system=system_of(task.convention),
        gpus=task.gpus,
        shape=shape,
        targets=targets,
        modes=task.modes,
        options=task.convention.options,
    )
    found = explore(question, db, jobs=1)
    cells = []
    for mode in task.modes:
        best, refusal, front = found.best[mode], found.refusals.get(mode), found.frontier[mode]
        cells.append(
            Cell(
                convention=task.convention.name,
                model=task.model,
                workload=task.workload,
                mode=mode,
                tokens_per_s=best.tokens_per_s if best else 0.0,
                limit=refusal.limit if refusal else "",
                reached=refusal.needed if refusal else math.nan,
                allowed=refusal.allowed if refusal else math.nan,
                ttft=best.ttft if best else math.nan,
                tpot=best.tpot if best else math.nan,
                gpus=gpus_text(best) if best else "",
                latency_end=_sides(front[-1]) if front and mode is Mode.AFD else (0, 0),
                most_per_gpu=front[0].tokens_per_s_gpu if front else 0.0,
                theirs=FIGURE_2.get((task.workload, mode)) if task.model == MODEL else None,
            )
        )
    return cells


def source_of(convention: Convention) -> KernelDB:
    """Kernel times of a convention.

    Raises:
        PlannerError: the measured kernels aren't installed.
    """
    system = find_system(SYSTEM)
    if convention.kernels == "roofline":
        return RooflineDB(system)
    from planner.explore.kernels.aic import AicDB

    return AicDB(system, allow_extrapolation=convention.options.allow_extrapolation)


def system_of(convention: Convention) -> System:
    """The GPUs and their network under a convention."""
    system = find_system(SYSTEM)
    if convention.cluster:
        system = with_network(system, "cluster", bandwidth=convention.cluster)
    return system


def gpus_text(point: Point) -> str:
    """What the GPUs of a point do: "4 x 14 attention tp 2 + 4 x 18 ffn"."""
    return " + ".join(
        f"{group.replicas} x {group.gpus} {group.role}"
        + (f" tp {group.tp}" if group.tp > 1 else "")
        for group in point.groups
    )


# -- processes -----------------------------------------------------------------------------------

_sources: dict[str, KernelDB] = {}  # of a process: reading tables takes seconds


def _answer(task: Task) -> list[Cell]:
    convention = task.convention
    if convention.kernels not in _sources:
        _sources[convention.kernels] = source_of(convention)
    db = _sources[convention.kernels]
    if (convention.attention, convention.experts) != (1.0, 1.0):
        db = Scaled(db, attention=convention.attention, experts=convention.experts)
    return cells_of(task, db)


def _answers(
    tasks: Sequence[Task], jobs: int | None, progress: Progress | None
) -> Mapping[Task, list[Cell]]:
    found: dict[Task, list[Cell]] = {}

    def take(task: Task, cells: list[Cell]) -> None:
        found[task] = cells
        if progress is not None:
            name = f"{task.model}, {task.workload}, {task.convention.name}"
            progress(name, len(found) / len(tasks))

    processes = min(jobs or os.cpu_count() or 1, len(tasks))
    if processes <= 1:
        for task in tasks:
            take(task, _answer(task))
        return found
    with ProcessPoolExecutor(processes) as pool:
        running = {pool.submit(_answer, task): task for task in tasks}
        try:
            for future in as_completed(running):
                take(running[future], future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def _sides(point: Point) -> tuple[int, int]:
    """Attention and FFN GPUs of one replica."""
    attention, ffn = point.groups
    return attention.gpus, ffn.gpus
