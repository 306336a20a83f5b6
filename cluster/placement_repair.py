"""A live holder for every expert at the price of the fewest moves, after actors were lost.

The work behind ``cluster.placement.repair``. Makes no attempt at balance beyond choosing where the
orphans go.
"""

from __future__ import annotations

from collections.abc import Sequence

from actors.table import ExpertTable, Holders
from cluster.placement_rules import Loads, check_room, layer_loads

Copy = tuple[int, int]  # (MoE layer, expert)


def repaired(
    current: ExpertTable, actors: Sequence[str], slots: int | None, loads: Loads | None
) -> dict[int, Holders]:
    """Holders in ``actors`` only, at least one of each expert, at most ``slots`` copies per actor.

    Raises:
        PlacementError: there is no room for one copy of each expert.
    """
    for experts in current.holders.values():
        check_room(len(current.holders), len(experts), len(actors), slots)
    return _Repair(current, actors, slots, loads).run()


class _Repair:
    def __init__(
        self, current: ExpertTable, actors: Sequence[str], slots: int | None, loads: Loads | None
    ):
        self.actors, self.slots = actors, slots
        live = set(actors)
        self.rows = {
            (layer, expert): [actor for actor in holders if actor in live]
            for layer, experts in current.holders.items()
            for expert, holders in enumerate(experts)
        }
        self.load: dict[Copy, float] = {}
        for layer, experts in current.holders.items():
            for expert, load in enumerate(layer_loads(loads, layer, len(experts))):
                self.load[layer, expert] = float(load)
        self.layers = {layer: len(experts) for layer, experts in current.holders.items()}
        # Per layer and actor: load, then number of copies; per actor: copies over all layers.
        self.weight = {layer: dict.fromkeys(actors, 0.0) for layer in self.layers}
        self.counts = {layer: dict.fromkeys(actors, 0) for layer in self.layers}
        self.totals = dict.fromkeys(actors, 0)
        for copy, holders in self.rows.items():
            for actor in holders:
                self._count(copy, actor, 1, self.load[copy] / len(holders))

    def run(self) -> dict[int, Holders]:
        orphans = [copy for copy, holders in self.rows.items() if not holders]
        orphans += self._cut_to_slots()
        orphans.sort(key=lambda copy: (-self.load[copy], copy))
        spare = self._replicas() if self.slots is not None else []
        for copy in orphans:
            actor = self._least_loaded(copy)
            while actor is None:  # every actor is full, so there are replicas: there is room
                replica, holder = spare.pop()
                if len(self.rows[replica]) > 1:
                    self._drop(replica, holder)
                actor = self._least_loaded(copy)
            self.rows[copy].append(actor)
            self._count(copy, actor, 1, self.load[copy])
        return {
            layer: tuple(tuple(self.rows[layer, expert]) for expert in range(number))
            for layer, number in self.layers.items()
        }

    def _cut_to_slots(self) -> list[Copy]:
        """Have actors beyond their slots drop replicas, then what weighs least; the new orphans."""
        orphans: list[Copy] = []
        for actor in self.actors:
            if self.slots is None or self.totals[actor] <= self.slots:
                continue
            mine = [copy for copy, holders in self.rows.items() if actor in holders]
            mine.sort(key=lambda copy: (len(self.rows[copy]) < 2, self.load[copy], copy))
            for copy in mine[: self.totals[actor] - self.slots]:
                self._drop(copy, actor)
                if not self.rows[copy]:
                    orphans.append(copy)
        return orphans

    def _replicas(self) -> list[tuple[Copy, str]]:
        """Copies of experts that have another holder, the one to be missed least last."""
        replicas = [
            (self.load[copy] / len(holders), copy, actor)
            for copy, holders in self.rows.items()
            if len(holders) > 1
            for actor in holders
        ]
        return [(copy, actor) for _, copy, actor in sorted(replicas, reverse=True)]

    def _least_loaded(self, copy: Copy) -> str | None:
        """The actor with least load in the layer among those with room; None: all are full."""
        weight, counts = self.weight[copy[0]], self.counts[copy[0]]
        free = [a for a in self.actors if self.slots is None or self.totals[a] < self.slots]
        return min(
            free, key=lambda a: (round(weight[a], 9), counts[a], self.totals[a]), default=None
        )

    def _drop(self, copy: Copy, actor: str) -> None:
        holders = self.rows[copy]
        share = self.load[copy] / len(holders)
        holders.remove(actor)
        self._count(copy, actor, -1, -share)
        for other in holders:  # they share what it carried
            self.weight[copy[0]][other] += self.load[copy] / len(holders) - share

    def _count(self, copy: Copy, actor: str, number: int, weight: float) -> None:
        self.weight[copy[0]][actor] += weight
        self.counts[copy[0]][actor] += number
        self.totals[actor] += number
