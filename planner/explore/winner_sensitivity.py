"""What happens to the winner when an input is moved: does another level win, and by how much?

Every input alone, the whole search again: a plan that only just wins falls to another split first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from planner.explore.kernels.base import Array, KernelDB, Load, Sides, Time
from planner.explore.model import Model
from planner.explore.points import Mode
from planner.explore.question import Exploration, Question
from planner.explore.search import explore
from planner.explore.system import System


@dataclass(frozen=True)
class Moved:
    """The winner with one input moved.

    Args:
        input: what was moved, for people.
        factor: by how much; nan for a convention.
        winner: level that wins then; None where none holds the targets.
        tokens_per_s: of it; 0 without a winner.
        change: of tokens/s against the winner as asked, as a share; nan where there was none.
        flips: another level wins, or none does any more.
    """

    input: str
    factor: float
    winner: Mode | None
    tokens_per_s: float
    change: float
    flips: bool


@dataclass(frozen=True)
class Scaled:
    """A source of kernel times with the times of one or both sides multiplied.

    Args:
        db: the source.
        attention, experts: factors; ``experts`` scales the exchange of unsplit replicas too.
    """

    db: KernelDB
    attention: float = 1.0
    experts: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.db.name}, attention x{self.attention:g}, experts x{self.experts:g}"

    def attention_factor(self) -> float:
        return self.attention
