"""Which FFN actor holds which expert when a cluster starts (pure, no Ray).

An even split: inside a layer no actor holds more than one expert more than another, and the
remainders rotate over the layers so that the totals differ by at most one as well. Not for moving
experts by measured load: that is a later, separate decision over an existing table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.errors import AffluxError
from actors.table import ExpertTable

Holders = dict[int, tuple[tuple[str, ...], ...]]


class PlacementError(AffluxError):
    """The experts can't be spread over the given actors."""

    code = "bad_placement"


def spread_evenly(layers: Sequence[int], num_experts: int, actors: Sequence[str]) -> Holders:
    """Give every expert of every layer to exactly one actor.

    Args:
        layers: global indices of the MoE layers, in any order, without repeats.
        num_experts: experts per layer, ids ``0 .. num_experts - 1``.
        actors: names of the FFN actors, at least one, at most ``num_experts``, without repeats.

    Returns:
        For each layer one entry per expert: the names of its holders (one name here).

    Raises:
        PlacementError: no layers, no actors, repeated names, or more actors than experts.
    """
    if not layers:
        raise PlacementError("no MoE layers to place: the model has no routed experts")
    if len(set(layers)) != len(layers) or len(set(actors)) != len(actors):
        raise PlacementError(f"layers and actors must not repeat: {list(layers)}, {list(actors)}")
    if not actors:
        raise PlacementError("no FFN actors: set ffn.count to 1 or more")
    if len(actors) > num_experts:
        raise PlacementError(
            f"{len(actors)} FFN actors for {num_experts} experts per layer: an actor would hold "
            f"nothing; set ffn.count to {num_experts} or less"
        )
    share, remainder = divmod(num_experts, len(actors))
    holders: Holders = {}
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
    layers: Sequence[int], num_experts: int, actors: Sequence[str], *, epoch: int = 1
) -> ExpertTable:
    """The first expert table of a cluster; arguments and errors as ``spread_evenly``."""
    return ExpertTable(epoch=epoch, holders=spread_evenly(layers, num_experts, actors))


def experts_of(table: ExpertTable, actor: str) -> dict[int, tuple[int, ...]]:
    """Layer -> sorted expert ids that ``actor`` holds (layers without any left out)."""
    held: Mapping[int, Sequence[int]] = table.shard(actor)
    return {layer: tuple(sorted(experts)) for layer, experts in sorted(held.items()) if experts}
