"""What a placement has to respect: copies per expert, room per actor, measured loads.

The checks that come before any packing, with errors that name the setting to change. Not the
packing itself (``cluster.packing``), nor tables (``cluster.placement``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.errors import AffluxError

Loads = Mapping[int, Sequence[float]]  # MoE layer -> load (pairs) per expert, any scale


class PlacementError(AffluxError):
    """The experts can't be spread over the given actors."""

    code = "bad_placement"


@dataclass(frozen=True)
class Rules:
    """How many copies of an expert there are to be.

    Args:
        min_replicas: FFN actors that hold each expert, at least (fewer when there are fewer actors
            or no room). redundant: further copies per layer, for the experts with most load.
        slots: the most (layer, expert) copies that one actor may hold over all layers, i.e. its
            memory for experts / bytes of one expert; None sets no limit.

    Raises:
        PlacementError: a number below its minimum.
    """

    min_replicas: int = 1
    redundant: int = 0
    slots: int | None = None

    def __post_init__(self) -> None:
        least = {"min_replicas": (self.min_replicas, 1), "redundant": (self.redundant, 0)}
        if self.slots is not None:
            least["slots"] = (self.slots, 1)
        for name, (given, minimum) in least.items():
            if given < minimum:
                raise PlacementError(f"{name} is {given}; it must be {minimum} or more")


def check_names(layers: Sequence[int], actors: Sequence[str]) -> None:
    """Raises PlacementError when there is nothing to place, nobody to take it, or a repeat."""
    if not layers:
        raise PlacementError("no MoE layers to place: the model has no routed experts")
    if len(set(layers)) != len(layers) or len(set(actors)) != len(actors):
        raise PlacementError(f"layers and actors must not repeat: {list(layers)}, {list(actors)}")
    if not actors:
        raise PlacementError("no FFN actors: set ffn.count to 1 or more")


def check_room(layers: int, num_experts: int, actors: int, slots: int | None) -> None:
    """Raises PlacementError when not even one copy of every expert fits."""
    needed = layers * num_experts
    if slots is not None and actors * slots < needed:
        raise PlacementError(
            f"{actors} FFN actors have room for {slots} experts each, {actors * slots} in all; "
            f"{layers} layers x {num_experts} experts need {needed}: raise ffn.expert_memory_gib "
            f"to {-(-needed // actors)} experts per actor, or ffn.count to {-(-needed // slots)}"
        )


def copies_per_layer(layers: int, num_experts: int, actors: int, rules: Rules) -> list[int]:
    """Copies of all experts together, for each layer in order.

    What the rules ask for, cut down evenly to what fits in the actors' slots, never below one copy
    of each expert nor above one per expert and actor.

    Raises:
        PlacementError: one copy of each does not fit, or fewer copies than actors are asked for.
    """
    check_room(layers, num_experts, actors, rules.slots)
    most = num_experts * actors
    asked = min(num_experts * min(rules.min_replicas, actors) + rules.redundant, most)
    if asked < actors:
        raise PlacementError(
            f"{actors} FFN actors for {num_experts} experts per layer and {asked} copies of them: "
            f"an actor would hold nothing; set ffn.count to {asked} or less, ffn.min_replicas to "
            f"{-(-actors // num_experts)} or ffn.redundant_experts to {actors - num_experts}"
        )
    if rules.slots is None:
        return [asked] * layers
    each, over = divmod(min(actors * rules.slots, layers * asked), layers)
    return [each + (index < over) for index in range(layers)]


def layer_loads(loads: Loads | None, layer: int, num_experts: int) -> np.ndarray:
    """Load of each expert of a layer ``[E]`` as a part of the highest, in 0..1 (float64).

    All are 1 where nothing was measured.

    Raises:
        PlacementError: another number of experts, or a load that is negative or not finite.
    """
    given = loads.get(layer) if loads is not None else None
    if given is None:
        return np.ones(num_experts)
    load = np.asarray(given, dtype=np.float64)
    if load.shape != (num_experts,):
        raise PlacementError(
            f"loads of layer {layer} have shape {load.shape}; expected one per expert, "
            f"({num_experts},)"
        )
    if not np.isfinite(load).all() or (load < 0).any():
        raise PlacementError(f"loads of layer {layer} must be finite and not negative: {given}")
    return load / load.max() if load.max() > 0 else np.ones(num_experts)
