"""How much work each expert gets: counts of FFN actors, added up over a sliding memory.

Pure. FFN actors report counts since their start; differences fade with a half-life, so that the
current load decides where experts go. Not for deciding it: see ``placement``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from actors.table import ExpertTable

Counts = Mapping[int, Sequence[float]]  # layer -> pairs per expert

HALF_LIFE_S = 60.0


class ExpertLoads:
    """Pairs per layer and expert, recent ones counting more.

    Args:
        half_life_s: seconds after which a pair counts half.
    """

    def __init__(self, half_life_s: float = HALF_LIFE_S):
        self._half_life_s = half_life_s
        self._last: dict[str, dict[int, list[float]]] = {}
        self._sums: dict[int, list[float]] = {}
        self._at = 0.0

    def take(self, actor: str, counts: Counts, now: float) -> None:
        """Take in an actor's counts since its start; names are never used again by another."""
        fade = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._at = max(self._at, now)
        for sums in self._sums.values():
            sums[:] = [value * fade for value in sums]
        before = self._last.get(actor, {})
        self._last[actor] = {layer: list(values) for layer, values in counts.items()}
        for layer, values in counts.items():
            sums = self._sums.setdefault(layer, [0.0] * len(values))
            old = before.get(layer, [0.0] * len(values))
            for expert, (new, was) in enumerate(zip(values, old, strict=True)):
                sums[expert] += max(0.0, new - was)

    def current(self, layers: Sequence[int], num_experts: int) -> dict[int, list[float]] | None:
        """Load per layer and expert; None while nothing was counted."""
        if not any(any(values) for values in self._sums.values()):
            return None
        return {layer: list(self._sums.get(layer, [0.0] * num_experts)) for layer in layers}


def imbalance(loads: Counts | None, table: ExpertTable | None) -> float:
    """Load of the busiest FFN actor over the mean, by layer, mean over layers weighted by load.

    Replicas share an expert's load evenly. A layer is done when its slowest actor is, so layers
    count one by one.

    Returns:
        at least 1; nan without loads or a table.
    """
    if not loads or table is None:
        return math.nan
    actors = table.actors
    slowest = total = 0.0
    for layer, holders in table.holders.items():
        shares: defaultdict[str, float] = defaultdict(float)
        for load, held_by in zip(loads.get(layer, ()), holders, strict=False):
            for actor in held_by:
                shares[actor] += load / len(held_by)
        slowest += max(shares.values(), default=0.0)
        total += sum(shares.values())
    return slowest * len(actors) / total if total else math.nan
