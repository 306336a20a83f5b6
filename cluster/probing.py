"""Measures the links between nodes: a small Ray actor on each, every pair once.

For ``siting``, before a deployment's actors are there. Labels say how far apart nodes should be;
this is how far they are.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.ray_actors import kill, worker_env
from cluster.spec import ClusterSpec
from cluster.topology import Link

MOST_NODES = 64
"""Beyond it links are believed to be what labels say: pairs grow with the square."""

PAIR_S = 5.0
"""Seconds for one pair; who needs longer counts as ``UNREACHABLE``."""

START_S = 60.0
"""Seconds for a node's process to start; those that need longer are left out."""

PAIRS_S = 60.0
"""Seconds after which no more pairs are begun: a deployment waits for this."""

UNREACHABLE = Link(1.0, 1e6)
"""For choosing: worse than anything that works."""

logger = logging.getLogger(__name__)


class Prober:
    """One node's end, see ``LinkProbe``; takes two calls at a time."""

    def __init__(self, name: str, ucx_tls: str | None, address: str):
        from actors.transport.link_probe import LinkProbe

        self._probe = LinkProbe(name, ucx_tls, address)

    def offer(self) -> Any:
        """What the other end's ``measure`` wants."""
        return self._probe.offer()

    def attend(self) -> None:
        """Let the other end write until ``rest``."""
        self._probe.attend(2 * PAIR_S)  # until whoever measures has given up

    def rest(self) -> None:
        """The other end is done."""
        self._probe.rest()

    def measure(self, offer: Any) -> Any:
        """Write to an end that attends; see ``LinkProbe.measure``."""
        return self._probe.measure(offer, PAIR_S)


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Every pair once, in rounds in which nobody is twice (the circle method). Pure."""
    circle: list[str | None] = [*names, *([None] if len(names) % 2 else [])]
    found: list[list[tuple[str, str]]] = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(a, b) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


async def probe(spec: ClusterSpec, nodes: Mapping[str, str]) -> dict[frozenset[str], Link]:
    """Measure all links between some nodes; takes about a second per node.

    Args:
        nodes: address -> Ray's id.

    Returns:
        Link by the two nodes' addresses; without those of nodes where nothing could be started, and
        of pairs whose turn did not come within ``PAIRS_S``.
    """
    if not 2 <= len(nodes) <= MOST_NODES:
        return {}
    probers = {
        address: ray.remote(Prober)
        .options(
            num_cpus=0,
            max_concurrency=2,
            runtime_env={"env_vars": worker_env(spec)},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote(f"probe-{address}", spec.transport.ucx_tls, address)
        for address, node_id in nodes.items()
    }
    try:
        offers = dict(
            pair
            for pair in await asyncio.gather(*(_offer(*item) for item in probers.items()))
            if pair is not None
        )
        links: dict[frozenset[str], Link] = {}
        deadline = time.monotonic() + PAIRS_S
        for pairs in rounds(sorted(offers)):
            if time.monotonic() > deadline:
                logger.warning("%d links were measured in time, labels say the rest", len(links))
                break
            measured = await asyncio.gather(
                *(_pair(probers[a], probers[b], offers[b]) for a, b in pairs)
            )
            links |= {frozenset(pair): link for pair, link in zip(pairs, measured, strict=True)}
        return links
    finally:
        for prober in probers.values():
            kill(prober)


async def _offer(address: str, prober: Any) -> tuple[str, Any] | None:
    try:
        async with asyncio.timeout(START_S):
            return address, await prober.offer.remote()
    except (RayError, TimeoutError) as error:
        logger.warning("links of %s are not measured: %s", address, str(error).strip()[:300])
        return None


async def _pair(one: Any, other: Any, offer: Any) -> Link:
    attending = other.attend.remote()
    try:
        async with asyncio.timeout(2 * PAIR_S):
            found = await one.measure.remote(offer)
        return Link(found.latency_s, found.bytes_per_s)
    except (RayError, TimeoutError) as error:
        logger.warning("no link to %s: %s", offer.name, str(error).strip()[-300:])
        return UNREACHABLE
    finally:
        with suppress(RayError, TimeoutError):
            async with asyncio.timeout(PAIR_S):
                await other.rest.remote()
                await attending
