"""GPUs, nodes and the tiers of network between them: numbers with their sources.

Inputs, not measurements of ours; every field can be set by the user. How transfers share a tier is
``network``'s business, reading systems from files ``system_files``'s.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from planner.errors import PlannerError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Args:
        name: for people.
        memory: bytes.
        bandwidth: of the memory, bytes per second, as in the data sheet.
        flops: dense operations per second by dtype: "bf16", "fp8", "fp4" where it has them.
        source: of these numbers.
        bandwidth_share: that kernels reach (0.8 in arXiv 2605.28302).
        flops_share: that kernels reach.
        launch: seconds every kernel takes at least (3 us, same source).
    """

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    source: str
    bandwidth_share: float = 0.8
    flops_share: float = 0.7
    launch: float = 3e-6


@dataclass(frozen=True)
class Tier:
    """A level of the network.

    Args:
        name: "nvlink", "node", "rack", "cluster".
        gpus: in one domain of the tier; None: all.
        latency: seconds of a message.
        bandwidth: bytes per second, per GPU and direction.
        p99: factor on a transfer's time for the 99th percentile.
    """

    name: str
    gpus: int | None
    latency: float
    bandwidth: float
    p99: float = 1.0


@dataclass(frozen=True)
class System:
    """Many of one GPU, and what joins them.

    Args:
        name: "h200_sxm", "b200_sxm", "gb200", ...
        gpu: each of them.
        node: GPUs per node.
        tiers: innermost first; the last has ``gpus`` None.
        kernels: name of the system in measured kernel data, "" where there is none.
    """

    name: str
    gpu: Gpu
    node: int
    tiers: tuple[Tier, ...]
    kernels: str = ""

    def __post_init__(self) -> None:
        if not self.tiers or self.tiers[-1].gpus is not None:
            raise PlannerError(
                f"the last tier of {self.name} has to join all GPUs: expected no number of GPUs"
            )
        sizes = [tier.gpus for tier in self.tiers[:-1]]
        if any(size is None for size in sizes) or sizes != sorted(set(filter(None, sizes))):
            raise PlannerError(
                f"tiers of {self.name} join {sizes} GPUs, expected numbers that grow from the "
                "innermost on, and only the last without one"
            )
        if self.node < 1:
            raise PlannerError(f"{self.name} has {self.node} GPUs per node, expected 1 or more")

    def tier(self, name: str) -> Tier:
        """The tier of that name.

        Raises:
            PlannerError: there is none.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise PlannerError(
            f"{self.name} has no tier {name!r}, expected one of "
            f"{', '.join(tier.name for tier in self.tiers)}"
        )


def with_network(
    system: System,
    tier: str,
    *,
    bandwidth: float | None = None,
    latency: float | None = None,
    p99: float | None = None,
) -> System:
    """The same system with another link.

    Args:
        tier: its name.
        bandwidth: bytes per second, per GPU and direction.
        latency: seconds.
        p99: factor for the 99th percentile.

    Raises:
        PlannerError: no such tier, or a number out of range.
    """
    old = system.tier(tier)
    new = replace(
        old,
        bandwidth=old.bandwidth if bandwidth is None else bandwidth,
        latency=old.latency if latency is None else latency,
        p99=old.p99 if p99 is None else p99,
    )
    if not (math.isfinite(new.bandwidth) and new.bandwidth > 0):
        raise PlannerError(f"bandwidth of {tier} is {new.bandwidth}, expected bytes/s above 0")
    if not (math.isfinite(new.latency) and new.latency >= 0):
        raise PlannerError(f"latency of {tier} is {new.latency}, expected seconds, 0 or more")
    if not (math.isfinite(new.p99) and new.p99 >= 1):
        raise PlannerError(f"p99 of {tier} is {new.p99}, expected a factor, 1 or more")
    return replace(system, tiers=tuple(new if t.name == tier else t for t in system.tiers))


def find_system(name: str) -> System:
    """A known system by its name, in any case.

    Raises:
        PlannerError: unknown; the nearest names are offered.
    """
    from planner.explore.systems import SYSTEMS

    wanted = name.strip().lower().replace("-", "_")
    if wanted in SYSTEMS:
        return SYSTEMS[wanted]
    if f"{wanted}_sxm" in SYSTEMS:
        return SYSTEMS[f"{wanted}_sxm"]
    near = difflib.get_close_matches(wanted, SYSTEMS, n=3, cutoff=0.4)
    offered = f"did you mean {' or '.join(near)}" if near else f"known are {', '.join(SYSTEMS)}"
    raise PlannerError(f"unknown system {name!r}: {offered}? A file can describe another one")


def read_system(path: str | Path) -> System:
    """A system from a YAML file: see ``system_files.read_system``."""
    from planner.explore import system_files

    return system_files.read_system(path)
