"""What lies between two expert tables, and how even one is.

For the membership transaction: ``additions`` are what actors load in *prepare*, ``union`` what they
hold until *release*, ``removals`` what they drop then. Decides nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from actors.table import ExpertTable
from cluster.placement_rules import Loads, layer_loads

Shards = dict[str, dict[int, list[int]]]  # actor -> MoE layer -> sorted expert ids
Copies = set[tuple[str, int, int]]  # (actor, MoE layer, expert)


def copies_of(table: ExpertTable | None) -> Copies:
    """Every copy in a table; none without a table."""
    if table is None:
        return set()
    return {
        (actor, layer, expert)
        for layer, experts in table.holders.items()
        for expert, holders in enumerate(experts)
        for actor in holders
    }


def _shards(copies: Copies) -> Shards:
    shards: Shards = defaultdict(lambda: defaultdict(list))
    for actor, layer, expert in sorted(copies):
        shards[actor][layer].append(expert)
    return {actor: dict(shard) for actor, shard in shards.items()}


def moves(old: ExpertTable | None, new: ExpertTable) -> int:
    """(actor, layer, expert) copies of ``new`` that have to be loaded."""
    return len(copies_of(new) - copies_of(old))


def additions(old: ExpertTable | None, new: ExpertTable) -> Shards:
    """What each actor has to load; actors that load nothing are left out."""
    return _shards(copies_of(new) - copies_of(old))


def removals(old: ExpertTable | None, new: ExpertTable) -> Shards:
    """What each actor can drop once ``new`` is in use everywhere, lost actors included."""
    return _shards(copies_of(old) - copies_of(new))


def union(old: ExpertTable | None, new: ExpertTable) -> Shards:
    """What each actor holds while both tables are in use (may exceed its slots meanwhile)."""
    return _shards(copies_of(old) | copies_of(new))


def actor_loads(
    table: ExpertTable, layer: int, loads: Loads | None, actors: Sequence[str]
) -> np.ndarray:
    """Load of each of ``actors`` in one layer ``[actors]``, in units of its most loaded expert's.

    Replicas share equally. ``actors`` must hold all holders of the layer.
    """
    experts = table.holders[layer]
    load = layer_loads(loads, layer, len(experts))
    place = {actor: index for index, actor in enumerate(actors)}
    result = np.zeros(len(actors))
    for expert, holders in enumerate(experts):
        for actor in holders:
            result[place[actor]] += load[expert] / len(holders)
    return result


def imbalance(
    table: ExpertTable,
    loads: Loads | None = None,
    *,
    layers: Sequence[int] | None = None,
    actors: Sequence[str] | None = None,
) -> float:
    """Highest actor load over the mean, in the worst of ``layers`` (all of them); 1.0 is perfect.

    ``actors`` defaults to those in the table; name them when one may hold nothing yet.
    """
    names = table.actors if actors is None else actors
    worst = 1.0
    for layer in table.layers if layers is None else layers:
        load = actor_loads(table, layer, loads, names)
        worst = max(worst, float(load.max() / load.mean()))
    return worst
