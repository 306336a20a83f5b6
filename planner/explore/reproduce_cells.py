"""One cell of Figure 2 of arXiv 2605.28302 as computed here, and whether it is right."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from planner.explore.paper_2605 import error
from planner.explore.points import Mode

MARGIN = 0.15
"""Largest error at which a feasible cell counts as met."""


@dataclass(frozen=True)
class Cell:
    """One cell of the figure under one convention.

    Args:
        convention, model, workload, mode: whose.
        tokens_per_s: of the whole system; 0 where infeasible.
        limit, reached, allowed: why, as ``Refusal``; "" and nan where feasible.
        ttft, tpot: seconds of the best; nan where infeasible.
        gpus: what they do in the best, see ``gpus_text``.
        latency_end: attention and FFN GPUs of a replica at the front's latency end; (0, 0)
            outside of AFD.
        most_per_gpu: tokens/s/GPU at the front's throughput end; 0 without a front.
        theirs: the paper's tokens/s; None where it has none.
    """

    convention: str
    model: str
    workload: str
    mode: Mode
    tokens_per_s: float
    limit: str
    reached: float
    allowed: float
    ttft: float
    tpot: float
    gpus: str
    latency_end: tuple[int, int]
    most_per_gpu: float
    theirs: float | None

    @property
    def feasible(self) -> bool:
        return self.tokens_per_s > 0

    @property
    def right(self) -> bool:
        """Infeasible where the paper's is, or within ``MARGIN`` of it."""
        if self.theirs is None:
            return not self.feasible
        return abs(self.error) <= MARGIN

    @property
    def error(self) -> float:
        """Relative; nan where the paper has no figure, -1 where only ours is infeasible."""
        return error(self.tokens_per_s, self.theirs)


def cell_data(cell: Cell) -> dict[str, Any]:
    """For JSON: what isn't a number is None."""
    data = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(cell).items()
    }
    missed = cell.error
    return data | {"right": cell.right, "error": missed if math.isfinite(missed) else None}
