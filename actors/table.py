"""The expert table: which FFN actor holds which expert, and since when.

A value, not a service: it is built by ``cluster.placement``, published with an epoch, and adopted
by attention actors between steps. It knows nothing of processes or connections.
"""

from collections.abc import Mapping
from dataclasses import dataclass

Holders = tuple[tuple[str, ...], ...]  # per expert of one layer: the actors that hold it


@dataclass(frozen=True)
class ExpertTable:
    """Holders of every routed expert at one epoch.

    Args:
        epoch: version, grows by one with every change. holders: layer index -> one tuple of actor
        names per expert (replicas in order of preference).

    Raises:
        ValueError: a layer without experts, an expert without a holder, or a holder named twice.
    """

    epoch: int
    holders: Mapping[int, Holders]

    def __post_init__(self) -> None:
        if not self.holders:
            raise ValueError("an expert table needs at least one MoE layer; got none")
        for layer, experts in self.holders.items():
            if not experts:
                raise ValueError(f"layer {layer} of the expert table has no experts")
            for expert, actors in enumerate(experts):
                if not actors:
                    raise ValueError(f"expert {expert} of layer {layer} has no holder")
                if len(set(actors)) != len(actors):
                    raise ValueError(f"expert {expert} of layer {layer}: {actors} repeats a holder")

    @property
    def layers(self) -> tuple[int, ...]:
        """MoE layers in ascending order."""
        return tuple(sorted(self.holders))

    @property
    def actors(self) -> tuple[str, ...]:
        """Every holder, sorted by name."""
        return tuple(sorted({a for e in self.holders.values() for h in e for a in h}))

    def shard(self, actor: str) -> dict[int, list[int]]:
        """Experts that ``actor`` holds: layer -> sorted expert ids, layers without any left out."""
        shard = {
            layer: [e for e, holders in enumerate(experts) if actor in holders]
            for layer, experts in self.holders.items()
        }
        return {layer: experts for layer, experts in shard.items() if experts}
