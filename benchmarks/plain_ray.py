"""What Ray alone costs: actors that do nothing are made and ended as afflux's manager does it.

An owner actor makes a placement group and a named, detached actor in it, calls it, and ends both.
What grows meanwhile grows without afflux; ``benchmarks.leaks`` measures both alike. Nothing here
belongs to serving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

_CALLS = 50
_TIMEOUT_S = 120.0


class Idle:
    """An actor without work."""

    def ping(self) -> None:
        """Answer."""


class Owner:
    """Makes and ends them."""

    def cycle(self, name: str) -> None:
        """One actor's life.

        Raises:
            ray.exceptions.GetTimeoutError: Ray found no place for it, or did not start it.
        """
        group = placement_group([{"CPU": 0.001}], name=name)
        try:
            ray.get(group.ready(), timeout=_TIMEOUT_S)
            made = (
                ray.remote(Idle)
                .options(
                    name=name,
                    num_cpus=0,
                    lifetime="detached",
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group),
                )
                .remote()
            )
            for _ in range(_CALLS):
                ray.get(made.ping.remote(), timeout=_TIMEOUT_S)
            ray.kill(made)
        finally:
            remove_placement_group(group)


def make_and_end(rounds: int, actors: int, after_each: Callable[[int], None]) -> None:
    """Make and end ``actors`` one after the other, so many ``rounds``. Needs a connection to Ray.

    Args:
        after_each: called with the number of the round, from 0.
    """
    owner: Any = ray.remote(Owner).options(num_cpus=0).remote()
    try:
        for number in range(rounds):
            for which in range(actors):
                ray.get(owner.cycle.remote(f"plain-{number}-{which}"), timeout=3 * _TIMEOUT_S)
            after_each(number)
    finally:
        ray.kill(owner)
