"""Which nodes attention and FFN actors belong on, by the network between them (pure, no Ray).

Dispatch and combine cross the wire in every layer, so actors that talk belong close together: on
one host, in one NVLink domain, in one rack. How far two nodes are apart comes from their Ray
labels, or from what was measured between them. Not here: what an actor needs (``preflight``), which
expert is where (``placement``).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from itertools import combinations_with_replacement, product
from typing import TypeVar

from cluster.preflight import Need, labels_match

LABELS = ("afflux.io/nvlink-domain", "afflux.io/rack", "ray.io/availability-zone")
"""Node labels that say what a node is part of, the closest first."""

ACCELERATORS: Mapping[str, tuple[float, float]] = {
    "L4": (24, 121),
    "L40S": (48, 362),
    "A10G": (24, 70),
    "A100-40G": (40, 312),
    "A100-80G": (80, 312),
    "H20": (96, 148),
    "H100": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
}
"""Ray's names (label ray.io/accelerator-type) -> GiB and dense bf16 TFLOP/s of one, from NVIDIA's
data sheets."""

_TOKENS = 4096.0  # bytes: what a step gives to a frontend

_Rest = tuple[int, float, float, tuple[str, ...]]
_T = TypeVar("_T")

ABOUT = 1.25
"""Times that differ by less are equal: what is measured is not exact."""

MOST_CHOICES = 20_000
"""Placements that are all looked at; beyond it, actors are placed one after another."""


class Tier(IntEnum):
    """How far two nodes are apart."""

    HOST = 0
    NVLINK = 1
    RACK = 2
    ZONE = 3
    FAR = 4


@dataclass(frozen=True)
class Link:
    """A way between two nodes: seconds for the first byte, bytes per second after it."""

    latency_s: float
    bytes_per_s: float


ASSUMED: Mapping[Tier, Link] = {
    Tier.HOST: Link(2e-6, 450e9),
    Tier.NVLINK: Link(3e-6, 450e9),
    Tier.RACK: Link(5e-6, 50e9),
    Tier.ZONE: Link(10e-6, 25e9),
    Tier.FAR: Link(500e-6, 1e9),
}
"""Where nothing was measured: NVLink 4, one 400 Gbit/s NIC, half of it, and another building. Their
order decides; only ``exchange_s`` shows the figures."""


@dataclass(frozen=True)
class Site:
    """A node, and what it has left for actors.

    Attributes:
        node: its name, unique. labels: Ray's. free: Ray resource -> amount.
        memory_per_flop: of its accelerators, any scale; None where nobody knows.
    """

    node: str
    labels: Mapping[str, str] = field(default_factory=dict)
    free: Mapping[str, float] = field(default_factory=dict)
    memory_per_flop: float | None = None


def memory_per_flop(labels: Mapping[str, str], total: Mapping[str, float]) -> float | None:
    """GiB per TFLOP/s of a node's accelerators; without any, GiB of memory per CPU.

    Args:
        total: Ray resources of the whole node.

    Returns:
        None where it has an accelerator that we don't know, or no CPUs.
    """
    name = labels.get("ray.io/accelerator-type")
    if name or total.get("GPU"):
        known = ACCELERATORS.get(name or "")
        return known[0] / known[1] if known else None
    cpus = total.get("CPU", 0.0)
    return total.get("memory", 0.0) / 2**30 / cpus if cpus else None


def tier(one: Site, other: Site) -> Tier:
    """The closest thing that two nodes have in common.

    Nodes that say nothing of where they are count as one zone.
    """
    if one.node == other.node:
        return Tier.HOST
    for label, found in zip(LABELS, (Tier.NVLINK, Tier.RACK, Tier.ZONE), strict=True):
        mine, theirs = one.labels.get(label), other.labels.get(label)
        if mine is not None and mine == theirs:
            return found
        if label == LABELS[-1] and (mine is None or theirs is None):
            return Tier.ZONE
    return Tier.FAR


@dataclass(frozen=True)
class Network:
    """Links between nodes.

    Attributes:
        assumed: by tier. measured: by the two nodes' names; goes before.
    """

    assumed: Mapping[Tier, Link] = field(default_factory=lambda: dict(ASSUMED))
    measured: Mapping[frozenset[str], Link] = field(default_factory=dict)

    def link(self, one: Site, other: Site) -> Link:
        """What was measured between two nodes, else what their tier is believed to do."""
        found = self.measured.get(frozenset((one.node, other.node)))
        return found or self.assumed[tier(one, other)]

    def rough(self) -> Network:
        """Measured links as far as they can be relied on: to a factor of two of the best one.

        A probe that had to wait for a core is off by that much, and who is a third nearer is not
        worth two actors on one node.
        """
        links = self.measured.values()
        latency = min((link.latency_s for link in links), default=1.0)
        rate = max((link.bytes_per_s for link in links), default=1.0)
        rounded = {
            pair: Link(
                latency * 2.0 ** math.floor(math.log2(link.latency_s / latency)),
                rate / 2.0 ** math.floor(math.log2(rate / link.bytes_per_s)),
            )
            for pair, link in self.measured.items()
        }
        return Network(self.assumed, rounded)


def exchange_s(
    attention: Sequence[Site], ffn: Sequence[Site], network: Network, nbytes: float
) -> float:
    """Seconds of one layer's dispatch and combine, the slowest attention actor's.

    Every attention actor sends an equal part of its rows to every FFN actor and gets as much back.
    What leaves a node's NVLink domain goes through one interface, where it adds up; so does what
    stays inside, and what stays on the node.

    Args:
        attention, ffn: each actor's node. nbytes: that one attention actor sends in a layer.
    """
    if not attention or not ffn:
        return 0.0
    share = 2.0 * nbytes / len(ffn)
    late = 0.0
    busy: defaultdict[tuple[str, Tier], float] = defaultdict(float)
    for one, other in product(attention, ffn):
        link = network.link(one, other)
        late = max(late, 2.0 * link.latency_s)
        interface = min(tier(one, other), Tier.RACK)
        for node in {one.node, other.node}:
            busy[node, interface] += share / link.bytes_per_s
    return late + max(busy.values())


@dataclass(frozen=True)
class Choice:
    """Where new actors should go.

    Attributes:
        attention, ffn: nodes of the new actors. seconds: ``exchange_s`` with them. worst: that of
        the worst placement; None where not all were looked at.
    """

    attention: tuple[Site, ...]
    ffn: tuple[Site, ...]
    seconds: float
    worst: float | None


def choose(
    sites: Sequence[Site],
    attention: Sequence[Need],
    ffn: Sequence[Need],
    network: Network,
    nbytes: float,
    *,
    present: tuple[Sequence[Site], Sequence[Site]] = ((), ()),
    home: Site | None = None,
) -> Choice | None:
    """The nodes that make a layer's exchange shortest; None where there is no room for all.

    Among placements that differ by less than a quarter (what is measured is not exact), the one is
    taken whose actors of a role crowd least on one node, of those the one that gives attention
    actors the nodes with more memory per compute, and of those the one with attention actors
    closest to ``home``. All placements are looked at where these are at most ``MOST_CHOICES``; else
    each actor in turn gets the best node for it.

    Args:
        sites: nodes with room. attention, ffn: what each new actor needs, equal within a role.
        nbytes: see ``exchange_s``. present: nodes of the actors that are there already.
        home: where requests come from and tokens go to.
    """
    sites = sorted(sites, key=lambda site: site.node)
    if not sites:
        return None
    count = math.comb(len(sites) + len(attention) - 1, len(attention))
    count *= math.comb(len(sites) + len(ffn) - 1, len(ffn))
    if count > MOST_CHOICES:
        return _one_by_one(sites, attention, ffn, network, nbytes, present, home)
    found: list[tuple[float, _Rest, Choice]] = []
    for mine in combinations_with_replacement(sites, len(attention)):
        for theirs in combinations_with_replacement(sites, len(ffn)):
            if not fits([*zip(attention, mine, strict=True), *zip(ffn, theirs, strict=True)]):
                continue
            everyone = [*present[0], *mine], [*present[1], *theirs]
            seconds = exchange_s(*everyone, network, nbytes)
            names = tuple(site.node for site in (*mine, *theirs))
            away = _away(mine, network, home)
            rest = (_crowding(*everyone), _unfit(mine, theirs), away, names)
            found.append((seconds, rest, Choice(mine, theirs, seconds, None)))
    if not found:
        return None
    return replace(_best(found), worst=max(seconds for seconds, _, _ in found))


def fits(placed: Sequence[tuple[Need, Site]]) -> bool:
    """Whether every node has the labels and, all together, the room for what is put on it."""
    used: dict[str, Counter[str]] = {}
    for need, site in placed:
        if not labels_match(need.labels, site.labels):
            return False
        taken = used.setdefault(site.node, Counter())
        taken.update(need.resources)
        if any(amount > site.free.get(name, 0.0) + 1e-6 for name, amount in taken.items()):
            return False
    return True


def _one_by_one(
    sites: Sequence[Site],
    attention: Sequence[Need],
    ffn: Sequence[Need],
    network: Network,
    nbytes: float,
    present: tuple[Sequence[Site], Sequence[Site]],
    home: Site | None,
) -> Choice | None:
    placed: tuple[list[tuple[Need, Site]], list[tuple[Need, Site]]] = ([], [])
    left = (list(attention), list(ffn))
    while left[0] or left[1]:
        # the role that is behind: both grow together, so that each sees the other
        role = 0 if len(left[0]) * len(ffn) >= len(left[1]) * len(attention) and left[0] else 1
        role = role if left[role] else 1 - role
        need = left[role].pop()
        found: list[tuple[float, _Rest, Site]] = []
        for site in sites:
            if not fits([*placed[0], *placed[1], (need, site)]):
                continue
            tried = [[*present[side], *(s for _, s in placed[side])] for side in (0, 1)]
            tried[role].append(site)
            seconds = exchange_s(tried[0], tried[1], network, nbytes)
            unfit = _unfit([site], []) if role == 0 else _unfit([], [site])
            away = _away([site] if role == 0 else [], network, home)
            found.append((seconds, (_crowding(*tried), unfit, away, (site.node,)), site))
        if not found:
            return None
        placed[role].append((need, _best(found)))
    mine, theirs = (tuple(site for _, site in side) for side in placed)
    seconds = exchange_s([*present[0], *mine], [*present[1], *theirs], network, nbytes)
    return Choice(mine, theirs, seconds, None)


def _best(found: Sequence[tuple[float, _Rest, _T]]) -> _T:
    """Of those whose time is about the least, the one with the least rest."""
    least = min(seconds for seconds, _, _ in found)
    _, what = min(
        ((rest, what) for seconds, rest, what in found if seconds <= least * ABOUT),
        key=lambda pair: pair[0],
    )
    return what


def _away(attention: Sequence[Site], network: Network, home: Site | None) -> float:
    """Time of a step's tokens from attention actors to where they are sent from, roughly."""
    if home is None:
        return 0.0
    links = [network.link(site, home) for site in attention if site.node != home.node]
    return sum(link.latency_s + _TOKENS / link.bytes_per_s for link in links)


def _crowding(attention: Sequence[Site], ffn: Sequence[Site]) -> int:
    """Grows with actors of one role on one node: all of them would be lost with it."""
    each = [Counter(site.node for site in role) for role in (attention, ffn)]
    return sum(count * count for nodes in each for count in nodes.values())


def _unfit(attention: Sequence[Site], ffn: Sequence[Site]) -> float:
    """Memory per compute that FFN actors have and attention actors lack; unknown counts as none."""
    has = [site.memory_per_flop or 0.0 for site in attention]
    return sum(site.memory_per_flop or 0.0 for site in ffn) - sum(has)
