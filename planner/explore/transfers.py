"""How long transfers between groups of GPUs take on a system's tiers.

A pair of GPUs meets at the innermost tier whose domain holds both. Each GPU has a port out and a
port in on every tier. The innermost tier is a fabric of its own (NVLink); what goes further out
passes the ports of all tiers from the second on (PCIe, leaf switch, spine) up to the one where the
pair meets. Flows share ports max-min fair (``fairness``). Cut-through: the latency of the outermost
tier is counted once, not per hop and not per message; a cost per peer is what posting many messages
adds. What links reach of their data sheet is in ``calibration``.

Not a packet simulator: no congestion control, no stragglers. What is sent: ``network``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import PlannerError
from planner.explore.calibration import Calibration, calibration_of
from planner.explore.fairness import Array, drain_time
from planner.explore.system import System, Tier

Percentile = Literal["p50", "p99"]


def exchange_time(
    system: System,
    sources: Sequence[int],
    targets: Sequence[int],
    sizes: ArrayLike,
    *,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> float:
    """Seconds until every source has sent its bytes to every target: any bytes, flow by flow.

    Costs grow with the cube of the flows: for exchanges where all pairs send the same, use
    ``symmetric_time``.

    Args:
        system: of all GPUs.
        sources, targets: numbers of GPUs, each side without repeats; a GPU may be on both, what it
            sends itself takes no time.
        sizes: [sources, targets] bytes.
        percentile: "p99" takes the largest factor of the tiers in use, or the calibration's
            spread where that is more.
        calibration: what links reach; none: ``calibration.calibration_of`` the system.

    Raises:
        PlannerError: shapes that don't fit, repeats, negative bytes.
    """
    chosen = calibration or calibration_of(system)
    volume = np.asarray(sizes, float)
    _check(sources, targets, volume)
    meets = meeting_tiers(_domains(system.tiers), sources, targets)
    volume = np.where(meets >= 0, volume, 0.0)
    used = volume > 0
    if not used.any():
        return 0.0
    flows = np.argwhere(used)
    tiers = len(system.tiers)
    passes = np.zeros((tiers * (len(sources) + len(targets)), len(flows)))
    for number, (source, target) in enumerate(flows):
        for tier in _ports(int(meets[source, target])):
            passes[source * tiers + tier, number] = 1
            passes[(len(sources) + target) * tiers + tier, number] = 1
    reached = [chosen.bandwidth(tier) for tier in system.tiers]
    capacities = np.tile(reached, len(sources) + len(targets))
    drain = drain_time(volume[used], passes, capacities)
    peers = max(int(used.sum(axis=1).max()), int(used.sum(axis=0).max()))
    crossed = [system.tiers[index] for index in np.unique(meets[used])]
    latency = max(chosen.latency(tier) for tier in crossed) + chosen.per_peer * peers
    return (latency + drain) * _factor(percentile, crossed, chosen)


def symmetric_time(
    system: System,
    sources: Sequence[int],
    targets: Sequence[int],
    size: float,
    *,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> float:
    """``exchange_time`` where every source sends ``size`` bytes to every target, by classes of GPUs
    that are alike; the same figure, fast."""
    _check(sources, targets, np.full((len(sources), len(targets)), float(size)))
    line = line_of(system, sources, targets, 1.0, None, percentile, calibration)
    return float(line.seconds(size))


def meeting_tiers(
    domains: Sequence[int | None], sources: Sequence[int], targets: Sequence[int]
) -> NDArray[np.int64]:
    """[sources, targets] index of the tier where two GPUs meet; -1 of a GPU with itself.

    Args:
        domains: GPUs per domain of each tier, innermost first; None: all.
        sources, targets: numbers of GPUs.
    """
    one, other = np.asarray(sources)[:, None], np.asarray(targets)[None, :]
    meets = np.zeros((len(sources), len(targets)), dtype=np.int64)
    for size in domains[:-1]:  # how many domains, from the innermost on, don't hold both
        meets += one // size != other // size
    meets[one == other] = -1
    return meets


@dataclass(frozen=True)
class Line:
    """Seconds of an exchange: ``latency`` and ``slope`` per unit of what every pair sends."""

    latency: float
    slope: float

    def seconds(self, units: ArrayLike) -> Array:
        amount = np.asarray(units, float)
        if np.any(amount < 0):
            raise PlannerError(f"{amount.min():g} tokens to send, expected 0 or more")
        return np.where(amount > 0, self.latency + self.slope * amount, 0.0)


def line_of(
    system: System,
    sources: Sequence[int],
    targets: Sequence[int],
    per_pair: float,
    other: System | None,
    percentile: Percentile,
    calibration: Calibration | None,
) -> Line:
    """The exchange where every source sends the same to every target. It is linear: all flows k
    times as large drain in k times the time.

    Args:
        system: of the sources, and of the targets where ``other`` is not given.
        sources, targets: numbers of GPUs; with ``other`` each side counts from 0.
        per_pair: bytes of a unit that every source sends to every target.
        other: of the targets where it differs; the sides then meet at the outermost tier.
        percentile, calibration: see ``exchange_time``.

    Raises:
        PlannerError: no GPUs on a side.
    """
    if not sources or not targets:
        raise PlannerError(f"{len(sources)} and {len(targets)} GPUs, expected 1 or more each")
    chosen = calibration or calibration_of(system)
    systems = [(system, chosen)]
    domains: tuple[int | None, ...]
    if other is None or other == system:
        domains = _domains(system.tiers)
        out = into = tuple(chosen.bandwidth(tier) for tier in system.tiers)
    else:
        systems.append((other, calibration or calibration_of(other)))
        # the sides have no domain in common: one tier, as fast as the way out of each side
        domains = (None,)
        out, into = ((_outermost(one, with_),) for one, with_ in systems)
        # each side counts its GPUs from 0: none of them is the same
        targets = tuple(max(sources) + 1 + target for target in targets)
    drain, peers, used = _unit_exchange(domains, out, into, tuple(sources), tuple(targets))
    if not used:
        return Line(0.0, 0.0)
    crossed = [
        (one.tiers[-1] if len(systems) > 1 else one.tiers[index], with_)
        for one, with_ in systems
        for index in used
    ]
    latency = max(with_.latency(tier) for tier, with_ in crossed)
    per_peer = max(with_.per_peer for _, with_ in crossed)
    factor = max(_factor(percentile, [tier], with_) for tier, with_ in crossed)
    return Line((latency + per_peer * peers) * factor, drain * per_pair * factor)


@lru_cache(maxsize=4096)
def _unit_exchange(
    domains: tuple[int | None, ...],
    out: tuple[float, ...],
    into: tuple[float, ...],
    sources: tuple[int, ...],
    targets: tuple[int, ...],
) -> tuple[float, int, tuple[int, ...]]:
    """Seconds per byte that every source sends to every target, by classes of flows; the most
    peers of a GPU; the tiers in use.

    Sources are alike that have as many targets of each class at each tier, and the other way
    round (the coarsest equitable partition). Flows between the same classes at the same tier then
    have the same max-min rate, so that one of each is enough.
    """
    meets = meeting_tiers(domains, sources, targets)
    used = tuple(int(index) for index in np.unique(meets[meets >= 0]))
    if not used:
        return 0.0, 0, ()
    at = np.stack([meets == index for index in used]).astype(float)
    senders, receivers = _alike(at)
    to = np.einsum("tij,jb->itb", at, _one_hot(receivers))[_first(senders)]
    came = np.einsum("tij,ia->jta", at, _one_hot(senders))[_first(receivers)]
    flows = np.argwhere(to > 0)  # rows of (class of sender, tier, class of receiver)
    tiers = len(domains)
    passes = np.zeros((tiers * (len(to) + len(came)), len(flows)))
    for number, (sender, tier, receiver) in enumerate(flows):
        for port in _ports(used[tier]):
            passes[sender * tiers + port, number] = to[sender, tier, receiver]
            passes[(len(to) + receiver) * tiers + port, number] = came[receiver, tier, sender]
    capacities = np.concatenate([np.tile(out, len(to)), np.tile(into, len(came))])
    drain = drain_time(np.ones(len(flows)), passes, capacities)
    peers = int(max(at.sum(axis=(0, 2)).max(), at.sum(axis=(0, 1)).max()))
    return drain, peers, used


def _alike(at: Array) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Classes of sources and targets by colour refinement; ``at`` is [tiers, sources, targets]."""
    senders, receivers = np.zeros(at.shape[1], np.int64), np.zeros(at.shape[2], np.int64)
    while True:
        before = senders.max() + receivers.max()
        seen = np.einsum("tij,jb->itb", at, _one_hot(receivers)).reshape(len(senders), -1)
        senders = np.unique(seen, axis=0, return_inverse=True)[1].reshape(-1)
        seen = np.einsum("tij,ia->jta", at, _one_hot(senders)).reshape(len(receivers), -1)
        receivers = np.unique(seen, axis=0, return_inverse=True)[1].reshape(-1)
        if senders.max() + receivers.max() == before:
            return senders, receivers


def _one_hot(labels: NDArray[np.int64]) -> Array:
    return np.eye(int(labels.max()) + 1)[labels]


def _first(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """One member of each class, in the order of the classes."""
    return np.unique(labels, return_index=True)[1]


def _ports(meeting: int) -> range:
    """Tiers whose ports a flow passes that meets at tier ``meeting``."""
    return range(min(1, meeting), meeting + 1)


def _outermost(system: System, calibration: Calibration) -> float:
    ports = _ports(len(system.tiers) - 1)
    return min(calibration.bandwidth(system.tiers[index]) for index in ports)


def _domains(tiers: Sequence[Tier]) -> tuple[int | None, ...]:
    return tuple(tier.gpus for tier in tiers)


def _factor(percentile: Percentile, crossed: Sequence[Tier], calibration: Calibration) -> float:
    if percentile == "p50":
        return 1.0
    return max(calibration.spread, *(tier.p99 for tier in crossed), 1.0)


def _check(sources: Sequence[int], targets: Sequence[int], sizes: Array) -> None:
    if sizes.shape != (len(sources), len(targets)) or not sizes.size:
        raise PlannerError(
            f"bytes of shape {sizes.shape} for {len(sources)} senders and {len(targets)} receivers"
        )
    if len(set(sources)) < len(sources) or len(set(targets)) < len(targets):
        raise PlannerError("a GPU is named twice on one side of an exchange")
    if not np.all(np.isfinite(sizes)) or sizes.min() < 0:
        raise PlannerError(f"{sizes.min():g} bytes to send, expected 0 or more")
