"""Which FFN actor holds which expert (pure, no Ray): tables for a start, a change and a loss.

``place`` is the table to aim for: experts evenly by count, then by measured load, replicas for the
hot ones, and few moves from the current table. ``repair`` is the quickest table after a loss: a
live holder for everything, nothing else. Both are deterministic and only say what should be; how
the weights get there is the manager's job.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from actors.table import ExpertTable, Holders
from cluster.packing import Layer, even_totals
from cluster.placement_repair import repaired
from cluster.placement_rules import (
    Loads,
    PlacementError,
    Rules,
    check_names,
    copies_per_layer,
    layer_loads,
)
from cluster.placement_steps import towards
from cluster.table_changes import additions, imbalance, moves, removals, union

__all__ = [
    "Loads",
    "PlacementError",
    "Rules",
    "additions",
    "imbalance",
    "initial_table",
    "moves",
    "place",
    "removals",
    "repair",
    "spread_evenly",
    "union",
]

ONE_COPY = Rules()

TOLERANCE = 0.05
"""Excess of the most loaded actor over the mean that is not worth moving an expert."""


def spread_evenly(
    layers: Sequence[int], num_experts: int, actors: Sequence[str]
) -> dict[int, Holders]:
    """Give every expert of every layer to exactly one actor, in runs of neighbouring ids.

    Inside a layer no actor holds more than one expert more than another, and the remainders rotate
    over the layers so that the totals differ by at most one as well.

    Args:
        layers: global indices of the MoE layers, in any order, without repeats.
        num_experts: experts per layer, ids ``0 .. num_experts - 1``.
        actors: names of the FFN actors, at least one, at most ``num_experts``, without repeats.

    Returns:
        For each layer one entry per expert: the names of its holders (one name here).

    Raises:
        PlacementError: no layers, no actors, repeated names, or more actors than experts.
    """
    check_names(layers, actors)
    if len(actors) > num_experts:
        raise PlacementError(
            f"{len(actors)} FFN actors for {num_experts} experts per layer: an actor would hold "
            f"nothing; set ffn.count to {num_experts} or less"
        )
    share, remainder = divmod(num_experts, len(actors))
    holders: dict[int, Holders] = {}
    next_extra = 0  # the actor that takes the next left-over expert, across layers
    for layer in sorted(layers):
        extra = {(next_extra + i) % len(actors) for i in range(remainder)}
        next_extra = (next_extra + remainder) % len(actors)
        row: list[tuple[str, ...]] = []
        for index, actor in enumerate(actors):
            row += [(actor,)] * (share + (index in extra))
        holders[layer] = tuple(row)
    return holders


def initial_table(
    layers: Sequence[int],
    num_experts: int,
    actors: Sequence[str],
    rules: Rules = ONE_COPY,
    *,
    epoch: int = 1,
) -> ExpertTable:
    """The first expert table of a cluster: ``place`` without a current table or loads."""
    return place(None, layers, num_experts, actors, rules, epoch=epoch)


def place(
    current: ExpertTable | None,
    layers: Sequence[int],
    num_experts: int,
    actors: Sequence[str],
    rules: Rules = ONE_COPY,
    loads: Loads | None = None,
    max_moves: int | None = None,
    *,
    epoch: int | None = None,
    tolerance: float = TOLERANCE,
) -> ExpertTable:
    """The table for these actors.

    In each layer the actors' counts of experts differ by at most one, and the highest actor load is
    at most ``1 + tolerance`` times the mean or the largest share (an expert's load over its
    replicas), or else at most the lowest actor load plus the largest share. What meets that stays
    where it is. Actors' totals over the layers end within two plus 5 % of each other.

    Args:
        current: the table now; its holders that are not in ``actors`` count as gone. None: none.
        layers: MoE layers. num_experts: experts per layer. actors: names of the FFN actors.
        rules: copies and room; what does not fit is left out evenly, redundant copies first.
        loads: measured load per expert, any scale; None or a layer without any: all equal.
        max_moves: copies to be loaded, at most; experts without a live holder are placed
            whatever it says. The rest of the way is for the next calls: until then counts and load
            may be less even than above.
        epoch: of the new table; default one after ``current``'s, or 1.
        tolerance: excess over the mean load that is not worth a move.

    Raises:
        PlacementError: nothing to place or nobody to take it, a repeat, no room for one copy of
            each expert, fewer copies per layer than actors, or loads that don't fit the layers.
    """
    check_names(layers, actors)
    layers = sorted(layers)
    if epoch is None:
        epoch = current.epoch + 1 if current else 1
    _check_shape(current, layers, num_experts)
    target = _target(current, layers, num_experts, actors, rules, loads, epoch, tolerance)
    if current is None or max_moves is None or moves(current, target) <= max_moves:
        return target
    base = repair(current, (), actors, rules, loads)
    target = _target(base, layers, num_experts, actors, rules, loads, epoch, tolerance)
    left = max(0, max_moves - moves(current, base))
    return ExpertTable(epoch, towards(base, target, left, actors, rules, loads))


def repair(
    current: ExpertTable,
    lost: Collection[str],
    actors: Sequence[str],
    rules: Rules = ONE_COPY,
    loads: Loads | None = None,
) -> ExpertTable:
    """The table with fewest moves that has a live holder for everything, one epoch on.

    Experts with a live holder lose the dead ones and stay where they are; the others go to the
    least loaded actors that have room. Replicas are not restored (``place`` does that); where all
    actors are full, they give way.

    Args:
        current: the table now. lost: holders that are gone. actors: those that may hold experts;
            other holders count as lost. rules: only ``slots`` matters. loads: as in ``place``.

    Raises:
        PlacementError: no actors, or no room for one copy of each expert.
    """
    live = [actor for actor in actors if actor not in lost]
    check_names(current.layers, live)
    return ExpertTable(current.epoch + 1, repaired(current, live, rules.slots, loads))


def _check_shape(current: ExpertTable | None, layers: Sequence[int], num_experts: int) -> None:
    if current is None:
        return
    sizes = {len(experts) for experts in current.holders.values()}
    if list(current.layers) != list(layers) or sizes != {num_experts}:
        raise PlacementError(
            f"the current table has layers {list(current.layers)} with {sorted(sizes)} experts; "
            f"asked for layers {list(layers)} with {num_experts}: these are two models"
        )


def _target(
    current: ExpertTable | None,
    layers: Sequence[int],
    num_experts: int,
    actors: Sequence[str],
    rules: Rules,
    loads: Loads | None,
    epoch: int,
    tolerance: float,
) -> ExpertTable:
    """What ``place`` aims for, whatever it costs."""
    copies = copies_per_layer(len(layers), num_experts, len(actors), rules)
    before: dict[int, Holders] = {}
    if current is not None:
        before = dict(current.holders)
    elif loads is None and len(actors) <= num_experts:
        before = spread_evenly(layers, num_experts, actors)
    place_of = {actor: index for index, actor in enumerate(actors)}
    packed: list[Layer] = []
    for layer, number in zip(layers, copies, strict=True):
        old = np.zeros((len(actors), num_experts), dtype=bool)
        for expert, holders in enumerate(before.get(layer, ())):
            for actor in holders:
                if actor in place_of:
                    old[place_of[actor], expert] = True
        load = layer_loads(loads, layer, num_experts)
        packed.append(Layer(old, load, number, rules.min_replicas, tolerance))
    totals = np.sum([pack.counts for pack in packed], axis=0)
    for pack in packed:
        totals -= pack.counts
        pack.fill(totals)
        totals += pack.counts
    even_totals(packed, rules.slots)
    rows: dict[int, Holders] = {}
    for layer, pack in zip(layers, packed, strict=True):
        pack.refine()
        rows[layer] = _names(pack.held, actors, before.get(layer))
    return ExpertTable(epoch, rows)


def _names(held: np.ndarray, actors: Sequence[str], before: Holders | None) -> Holders:
    """Holders by name; those that stay keep their order, so that no change means an equal row."""
    rows: list[list[str]] = [[] for _ in range(held.shape[1])]
    for expert, actor in zip(*np.nonzero(held.T), strict=True):
        rows[expert].append(actors[actor])
    if before is not None:
        for expert, holders in enumerate(before):
            stay = [name for name in holders if name in rows[expert]]
            rows[expert] = stay + [name for name in rows[expert] if name not in stay]
    return tuple(tuple(row) for row in rows)
