"""Has ``topology`` choose nodes for the actors that start in one moment, all together.

One at a time, the first would be put anywhere and the rest would have to follow. The choice is
advice: who finds it taken goes wherever Ray has room.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cluster.preflight import Need
from cluster.slowness import Slowness, WireTimes, ratios, slow
from cluster.spec import ROLES, ClusterSpec, Role
from cluster.status import LinkStatus, SlowActor, TopologyStatus
from cluster.topology import Choice, Link, Network, Site, choose, exchange_s, fits, tier

ROWS = 128
"""Of a decode batch, as far as the choice is concerned: what a layer's dispatch carries."""

AVOID_S = 60.0
"""Seconds for which a node that lost an actor gets no other while there is room elsewhere. If the
node is gone, Ray finds out only after some tens of seconds, and starts actors there until then."""

SLOW_S = 600.0
"""As long for a node whose actor was slow to reach: without one, nobody measures it any more."""

logger = logging.getLogger(__name__)

_WIRE_BYTES = 2  # per element


@dataclass
class _Asking:
    role: Role
    answer: asyncio.Future[str | None]


class Siting:
    """Belongs to one event loop.

    Args:
        spec: the deployment's.
        sites: the live nodes with what they have left (blocks).
        present: nodes of the actors that there are, by role.
        node_of: address of an actor's node by its name; None where nobody knows.
        home: address of this process's node, which frontends share or are near to.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        sites: Callable[[], Sequence[Site]],
        present: Callable[[Role, Sequence[Site]], Sequence[Site]],
        node_of: Callable[[str], str | None],
        home: Callable[[], str],
    ):
        self.network = Network()
        self.hidden_size = 1
        self._spec, self._sites, self._present, self._node_of = spec, sites, present, node_of
        self._address = home
        self._asking: list[_Asking] = []
        self._until: dict[str, float] = {}  # nodes to be avoided
        self._wires = WireTimes()
        self._choosing: asyncio.Task[None] | None = None

    @property
    def nbytes(self) -> float:
        """What one attention actor sends in a layer, roughly."""
        return float(ROWS * self.hidden_size * _WIRE_BYTES)

    def avoid(self, address: str) -> None:
        """A node has just lost an actor."""
        self._avoid(address, AVOID_S)

    def heard(self, attention: str, wire_s: Mapping[str, float]) -> None:
        """What an attention actor says of the wire to FFN actors, see ``WireTimes.hear``."""
        now = time.monotonic()
        self._wires.hear(attention, wire_s, now)
        for name, (node, ratio) in self._slow_ones(self._wires.pairs(now)).items():
            if self._until.get(node, -math.inf) < now:
                logger.warning("%s on %s is slow to reach: %.1f times", name, node, ratio)
            self._avoid(node, SLOW_S)

    def _slow_ones(self, wires: Mapping[tuple[str, str], float]) -> dict[str, tuple[str, float]]:
        """Slow actors -> node and ratio. On one node it is the cores that are short, not links."""
        found: dict[str, tuple[str, float]] = {}
        for name, ratio in sorted(slow(wires).items()):
            side = next(side for pair in wires for side in (0, 1) if pair[side] == name)
            nodes = {self._node_of(pair[side]) for pair in wires}
            node = self._node_of(name)
            if node is not None and len(nodes) > 1:
                found[name] = node, ratio
        return found

    def use_links(self, links: Iterable[tuple[str, str, float, float]]) -> None:
        """Go by what was measured: two nodes' addresses, latency in s, bytes per s."""
        measured = {frozenset((a, b)): Link(latency, rate) for a, b, latency, rate in links}
        self.network = Network(measured=measured)

    def slowness(self, present: Collection[str]) -> Slowness:
        """Of the actors that are there, as far as there are reports."""
        every = self._wires.pairs(time.monotonic()).items()
        wires = {pair: seconds for pair, seconds in every if all(one in present for one in pair)}
        slow_ones = self._slow_ones(wires)
        found = ratios(wires)
        return Slowness(found, Counter(role for role, name in found if name in slow_ones))

    def _avoid(self, address: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until[address] = max(until, self._until.get(address, until))

    async def node_for(self, role: Role) -> str | None:
        """Address of the node where a new actor should go; None where any is as good."""
        asking = _Asking(role, asyncio.get_running_loop().create_future())
        self._asking.append(asking)
        if self._choosing is None or self._choosing.done():
            self._choosing = asyncio.ensure_future(self._choose())
        return await asking.answer

    async def _choose(self) -> None:
        await asyncio.sleep(0)  # whoever starts in the same moment has asked by then
        while self._asking:
            asking, self._asking = self._asking, []
            nodes: dict[Role, list[str]] = {role: [] for role in ROLES}
            try:
                sites = await asyncio.to_thread(self._sites)
                if len(sites) > 1:
                    present = self._present("attention", sites), self._present("ffn", sites)
                    # many choices take a while, and the loop watches actors
                    choice = await asyncio.to_thread(self._chosen, sites, asking, present)
                    if choice is not None:
                        nodes["attention"] = [site.node for site in choice.attention]
                        nodes["ffn"] = [site.node for site in choice.ffn]
            except Exception:  # advice is no reason not to start
                logger.exception("no node was chosen for %d new actors", len(asking))
            for one in asking:
                if not one.answer.done():
                    free = nodes[one.role]
                    one.answer.set_result(free.pop(0) if free else None)

    def _home(self, sites: Sequence[Site]) -> Site | None:
        address = self._address()
        return next((site for site in sites if site.node == address), None)

    def _sound(self, sites: Sequence[Site]) -> list[Site]:
        now = time.monotonic()
        return [site for site in sites if self._until.get(site.node, -math.inf) < now]

    def report(self, actors: Mapping[str, tuple[Role, str]]) -> TopologyStatus:
        """How far apart actors are, and how well that was chosen (blocks).

        Args:
            actors: name -> role and address of its node.
        """
        wires = self._wires.pairs(time.monotonic())
        sites = {site.node: site for site in self._sites()}
        nodes = {name: node for name, (_, node) in actors.items() if node in sites}
        by_role = {role: [n for n in nodes if actors[n][0] == role] for role in ROLES}
        taken: dict[str, Counter[str]] = {}
        needs: dict[Role, list[Need]] = {}
        for role, names in by_role.items():
            pool = self._spec.pool(role)
            needs[role] = [Need(name, pool.resources.bundle(), pool.labels) for name in names]
            for name in names:
                taken.setdefault(nodes[name], Counter()).update(pool.resources.bundle())
        empty = [
            replace(site, free=Counter(site.free) + taken.get(node, Counter()))
            for node, site in sites.items()
        ]
        needed = needs["attention"], needs["ffn"]
        rough = self.network.rough()
        choice = choose(empty, *needed, rough, self.nbytes, home=self._home(empty))
        where = {role: [sites[nodes[name]] for name in names] for role, names in by_role.items()}
        return TopologyStatus(
            nodes=nodes,
            links=tuple(
                self._link(
                    one, other, sites[nodes[one]], sites[nodes[other]], wires.get((one, other))
                )
                for one, other in product(by_role["attention"], by_role["ffn"])
            ),
            nbytes=self.nbytes,
            exchange_s=exchange_s(where["attention"], where["ffn"], rough, self.nbytes),
            best_s=choice.seconds if choice else None,
            worst_s=choice.worst if choice else None,
            slow=tuple(
                self._slow(name, *actors[name], ratio, list(sites.values()), by_role)
                for name, (_, ratio) in self._slow_ones(wires).items()
                if name in actors
            ),
        )

    def _slow(
        self,
        name: str,
        role: Role,
        node: str,
        ratio: float,
        sites: Sequence[Site],
        by_role: Mapping[Role, Sequence[str]],
    ) -> SlowActor:
        pool = self._spec.pool(role)
        need = Need(role, pool.resources.bundle(), pool.labels)
        others = [site for site in self._sound(sites) if site.node != node]
        room = next((site.node for site in others if fits([(need, site)])), None)
        command: str | None
        if room is not None:
            command = f"afflux retire {name} --replace"
            advice = f"have another take its place, on a node such as {room}"
        elif len(by_role[role]) > pool.min:
            command = f"afflux retire {name}"
            advice = "no other node has room: let it go, the others do its work"
        else:
            command, advice = None, "no other node has room and none can go: add a node"
        return SlowActor(actor=name, role=role, ratio=ratio, advice=advice, command=command)

    def _link(
        self, attention: str, ffn: str, one: Site, other: Site, wire_s: float | None
    ) -> LinkStatus:
        link = self.network.link(one, other)
        return LinkStatus(
            attention=attention,
            ffn=ffn,
            tier=tier(one, other).name.lower(),
            latency_s=link.latency_s,
            bytes_per_s=link.bytes_per_s,
            measured=frozenset((one.node, other.node)) in self.network.measured,
            wire_s=wire_s,
        )

    def _chosen(
        self,
        sites: Sequence[Site],
        asking: Sequence[_Asking],
        present: tuple[Sequence[Site], Sequence[Site]],
    ) -> Choice | None:
        needs: dict[Role, list[Need]] = {role: [] for role in ROLES}
        for one in asking:
            pool = self._spec.pool(one.role)
            needs[one.role].append(Need(one.role, pool.resources.bundle(), pool.labels))
        for among in (self._sound(sites), sites):
            found = choose(
                among,
                needs["attention"],
                needs["ffn"],
                self.network.rough(),
                self.nbytes,
                present=present,
                home=self._home(sites),
            )
            if found is not None:
                return found
        return None
