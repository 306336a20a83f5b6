"""What happens to the winner when an input is moved: does another level win, and by how much?

One input at a time, and the whole search again for each: with an input moved, another split of the
same level may be the best. So it takes as long as a dozen searches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.explore.kernels.base import KernelDB
from planner.explore.points import Mode, Point
from planner.explore.question import Exploration, Question
from planner.explore.scaled import Scaled
from planner.explore.search import explore
from planner.explore.system import System, with_network

Search = Callable[[Question, KernelDB, KernelDB], Exploration]
"""Of a question and kernel times of both sides."""


@dataclass(frozen=True)
class Moved:
    """The winner with one input moved.

    Args:
        input: what was moved, for people.
        factor: by which; nan where a convention was changed.
        winner: level that wins then; None where none holds the targets.
        tokens_per_s: of it, whole system; 0 without a winner.
        change: of tokens/s against the winner as asked, as a share of it; nan without one.
        flips: it is another level than the one that wins as asked.
    """

    input: str
    factor: float
    winner: Mode | None
    tokens_per_s: float
    change: float
    flips: bool

    @property
    def text(self) -> str:
        """What was moved and how, for people."""
        return self.input if math.isnan(self.factor) else f"{self.input} x{self.factor:g}"


def winner_sensitivity(
    found: Exploration,
    db: KernelDB,
    *,
    ffn_db: KernelDB | None = None,
    jobs: int | None = None,
    progress: Callable[[str, float], None] | None = None,
    search: Search | None = None,
) -> list[Moved]:
    """The winner under every change of ``changes``.

    Args:
        found: the search as asked.
        db, ffn_db, jobs: of that search.
        progress: is told what was just tried, and the share of all that is done.
        search: how to search; none: ``search.explore``.
    """

    def full(question: Question, one: KernelDB, other: KernelDB) -> Exploration:
        return explore(question, one, ffn_db=other, jobs=jobs)

    before = _top(found)
    moved = []
    tried = list(changes(found.question, db, ffn_db or db))
    for count, (name, factor, question, one, other) in enumerate(tried, 1):
        after = (search or full)(question, one, other)
        top = _top(after)
        rate = top.tokens_per_s if top else 0.0
        change = rate / before.tokens_per_s - 1.0 if before else math.nan
        flips = after.winner != found.winner
        moved.append(Moved(name, factor, after.winner, rate, change, flips))
        if progress is not None:
            progress(moved[-1].text, count / len(tried))
    return moved


def changes(
    question: Question, db: KernelDB, ffn_db: KernelDB
) -> Iterator[tuple[str, float, Question, KernelDB, KernelDB]]:
    """Every input that is moved: its name, the factor (nan: a convention), and what to ask then."""
    for factor in (0.5, 2.0):
        ffn_system = question.ffn_system
        moved = replace(
            question,
            system=_faster(question.system, factor),
            ffn_system=ffn_system and _faster(ffn_system, factor),
        )
        yield "network bandwidth", factor, moved, db, ffn_db
    for factor in (0.8, 1.2):
        one, other = (Scaled(source, attention=factor) for source in (db, ffn_db))
        yield "attention time", factor, question, one, other
        one, other = (Scaled(source, experts=factor) for source in (db, ffn_db))
        yield "expert time", factor, question, one, other
    for name in ("ttft", "tpot"):
        for factor in (0.8, 1.2):
            limit = factor * getattr(question.targets, name)
            targets = replace(question.targets, **{name: limit})
            moved = replace(question, targets=targets)
            yield f"{name.upper()} allowed", factor, moved, db, ffn_db
    options = question.options
    fan = replace(options, fan="paper" if options.fan == "distinct" else "distinct")
    yield f"fan-out: {fan.fan}", math.nan, replace(question, options=fan), db, ffn_db
    overlap = replace(options, overlap="paper" if options.overlap == "safe" else "safe")
    yield f"overlap: {overlap.overlap}", math.nan, replace(question, options=overlap), db, ffn_db


def _faster(system: System, factor: float) -> System:
    for tier in system.tiers:
        system = with_network(system, tier.name, bandwidth=factor * tier.bandwidth)
    return system


def _top(found: Exploration) -> Point | None:
    return None if found.winner is None else found.best[found.winner]
