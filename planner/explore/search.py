"""Looks through all configurations of all modes: the best within the targets, and the fronts.

The work is cut into ``units``, spread over processes, and kept in a file if one is given, so that a
search that was stopped goes on where it was. What a unit does is in the modes' files. Start here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.explore.kept import digest
from planner.explore.kernels.base import KernelDB
from planner.explore.points import Mode
from planner.explore.question import Exploration, Question
from planner.explore.refusals import refusal_of
from planner.explore.units import Setup, Unit, Worker, units_of
from planner.kept import Kept

Progress = Callable[[str, float], None]
"""Is told what was just done, and the share of all work that is done, 0 to 1."""


def explore(
    question: Question,
    db: KernelDB,
    *,
    ffn_db: KernelDB | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
    resume: Path | None = None,
    prune: bool = True,
) -> Exploration:
    """The best of every mode within the targets, its front, and why there is none.

    Replica sizes are the divisors of the GPUs and the powers of two; of GPUs that a size doesn't
    divide the rest stays idle. Batches are those of a grid: all up to 16 per micro-batch, then in
    steps of 9 %.

    Args:
        question: that is asked.
        db: kernel times, of the FFN side too where ``ffn_db`` isn't given.
        ffn_db: of the GPUs of the FFN side.
        jobs: processes; None: one per core; 1: this one.
        progress: is told how far it is.
        resume: a file of finished work, made where it isn't there; a search with the same question
            doesn't do it again.
        prune: leave out configurations that provably can't matter. The answer is the same.

    Raises:
        PlannerError: numbers out of range, or a file that can't be written.
    """
    check(question, jobs)
    began = time.monotonic()
    setup = Setup(question, db, ffn_db or db, prune)
    units = units_of(question)
    kept = Kept(resume, digest(question, db.name, setup.ffn_db.name))
    todo = [unit for unit in units if kept.get(unit.name) is None]
    for count, (unit, result) in enumerate(_done(setup, todo, jobs), len(units) - len(todo) + 1):
        kept.put(unit.name, result)
        if progress is not None:
            progress(unit.name, count / len(units))
    results = {unit: kept.get(unit.name) for unit in units}
    worker = Worker(setup)
    found = {mode: worker.found(mode, results) for mode in question.modes}
    return Exploration(
        question=question,
        best={mode: one.best for mode, one in found.items()},
        frontier={mode: one.front for mode, one in found.items()},
        refusals={
            mode: refusal_of(question, mode, one.reach)
            for mode, one in found.items()
            if one.best is None
        },
        evaluated=sum(result["evaluated"] for result in results.values()),
        seconds=time.monotonic() - began,
        source=db.name if setup.ffn_db is db else f"{db.name}; FFN side: {setup.ffn_db.name}",
    )


def check(question: Question, jobs: int | None = None) -> None:
    """Refuses questions without an answer.

    Raises:
        PlannerError: too few GPUs, targets, shares or processes out of range.
    """
    options, targets = question.options, question.targets
    if question.gpus < 2:
        raise PlannerError(f"{question.gpus} GPUs: there is nothing to divide, expected at least 2")
    if not question.modes:
        raise PlannerError(f"no modes to compare, expected some of {', '.join(Mode)}")
    for name, value in (("TTFT", targets.ttft), ("TPOT", targets.tpot)):
        if not value > 0:
            raise PlannerError(f"target {name} is {value} s, expected more than 0")
    for name in ("prefill_rate", "decode_rate", "memory_share"):
        share = getattr(options, name)
        if not 0 < share <= 1:
            raise PlannerError(f"{name} is {share}, expected a share above 0, up to 1")
    if options.pd_ttft < 1:
        raise PlannerError(f"pd_ttft is {options.pd_ttft}, expected a factor of at least 1")
    if options.wire_bytes <= 0:
        raise PlannerError(f"wire_bytes is {options.wire_bytes}, expected more than 0")
    if any(lanes < 1 for lanes in options.lanes):
        raise PlannerError(f"lanes are {options.lanes}, expected at least 1 each")
    if jobs is not None and jobs < 1:
        raise PlannerError(f"jobs is {jobs}, expected at least 1")


def _done(
    setup: Setup, units: Sequence[Unit], jobs: int | None
) -> Iterator[tuple[Unit, dict[str, Any]]]:
    """Units with their results, as they are done."""
    processes = min(jobs or os.cpu_count() or 1, len(units))
    if processes <= 1:
        worker = Worker(setup)
        for unit in units:
            yield unit, worker.work(unit)
        return
    with ProcessPoolExecutor(processes, initializer=_start, initargs=(setup,)) as pool:
        running = {pool.submit(_work, unit): unit for unit in units}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_worker: Worker  # of a process of the pool


def _start(setup: Setup) -> None:
    global _worker
    _worker = Worker(setup)


def _work(unit: Unit) -> dict[str, Any]:
    return _worker.work(unit)
