"""Part of the way from one expert table to another, when only so many copies may be loaded.

The work behind ``max_moves`` of ``cluster.placement.place``. Every step (an expert gets a holder,
loses one, or both) leaves a valid table, so any selection of them is one; this chooses which.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from actors.table import ExpertTable, Holders
from cluster.placement_rules import Loads, Rules, layer_loads
from cluster.table_changes import actor_loads


class Step(NamedTuple):
    """One expert gets the holder ``add``, loses ``drop``, or both; ``add`` has to load it."""

    layer: int
    expert: int
    add: str | None
    drop: str | None


def towards(
    base: ExpertTable,
    target: ExpertTable,
    budget: int,
    actors: Sequence[str],
    rules: Rules,
    loads: Loads | None,
) -> dict[int, Holders]:
    """Holders on the way from ``base`` to ``target`` with at most ``budget`` copies loaded.

    Experts that lack replicas come first, then layer by layer, the least even one first. No actor
    exceeds its slots; one that is full takes a copy together with the step that frees a slot.
    """
    walk = _Walk(base, target, budget, actors, rules.slots)
    walk.try_all(step for step in walk.waiting if step.add is None)
    walk.try_all(
        step
        for step in list(walk.waiting)
        if step.drop is None and len(base.holders[step.layer][step.expert]) < rules.min_replicas
    )
    before = {layer: actor_loads(base, layer, loads, actors) for layer in base.layers}
    unevenness = {layer: load.max() / load.mean() for layer, load in before.items()}
    for layer in sorted(base.layers, key=lambda layer: (-unevenness[layer], layer)):
        number = len(base.holders[layer])
        heaviest = np.argsort(-layer_loads(loads, layer, number), kind="stable")
        rank = {int(expert): index for index, expert in enumerate(heaviest)}
        steps = [step for step in walk.waiting if step.layer == layer]
        walk.try_all(sorted(steps, key=lambda step: rank[step.expert]))
    return walk.holders()


class _Walk:
    def __init__(
        self,
        base: ExpertTable,
        target: ExpertTable,
        budget: int,
        actors: Sequence[str],
        slots: int | None,
    ):
        self.base, self.target, self.left, self.slots = base, target, budget, slots
        self.rows = {layer: [list(h) for h in rows] for layer, rows in base.holders.items()}
        self.totals = Counter(a for rows in base.holders.values() for h in rows for a in h)
        self.waiting: dict[Step, None] = {}  # an ordered set
        self.freeing: dict[str, dict[Step, None]] = defaultdict(dict)  # actor -> steps it drops in
        for layer in base.layers:
            pairs = zip(base.holders[layer], target.holders[layer], strict=True)
            for expert, (old, new) in enumerate(pairs):
                adds = [actor for actor in new if actor not in old]
                drops = [actor for actor in old if actor not in new]
                for add, drop in zip_longest(adds, drops):
                    step = Step(layer, expert, add, drop)
                    self.waiting[step] = None
                    if drop is not None:
                        self.freeing[drop][step] = None

    def try_all(self, steps: Iterable[Step]) -> None:
        """Take each step that the budget and the slots allow."""
        for step in list(steps):
            if step in self.waiting:
                for each in self._with_what_frees_slots(step):
                    self._take(each)

    def holders(self) -> dict[int, Holders]:
        """The table so far."""
        return {layer: tuple(tuple(h) for h in rows) for layer, rows in self.rows.items()}

    def _with_what_frees_slots(self, first: Step) -> list[Step]:
        """``first`` and the steps that must come with it; none when it can't be taken now."""
        bundle = {first: None}
        change: Counter[str] = Counter()
        step = first
        while True:
            if step.drop is not None:
                change[step.drop] -= 1
            if step.add is not None:
                change[step.add] += 1
            if sum(each.add is not None for each in bundle) > self.left:
                return []
            full = next((a for a, n in change.items() if n > 0 and self._over(a, n)), None)
            if full is None:
                return list(bundle)
            found = next((each for each in self.freeing[full] if each not in bundle), None)
            if found is None:
                return []
            step = found
            bundle[step] = None

    def _over(self, actor: str, more: int) -> bool:
        return self.slots is not None and self.totals[actor] + more > self.slots

    def _take(self, step: Step) -> None:
        holders = self.rows[step.layer][step.expert]
        if step.drop is not None:
            holders.remove(step.drop)
            self.totals[step.drop] -= 1
            del self.freeing[step.drop][step]
        if step.add is not None:
            holders.append(step.add)
            self.totals[step.add] += 1
            self.left -= 1
        del self.waiting[step]
