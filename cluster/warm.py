"""Warm workers: processes that have imported everything and wait for a role.

Keeps as many ready as the spec says, on the nodes where actors run, and hands one out when an actor
is to start on its node. Not for what a worker becomes: see ``seats``.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError

from cluster import ray_actors
from cluster.spec import ClusterSpec

logger = logging.getLogger(__name__)

PREFIX = "warm"

AGAIN_S = 2.0
"""Pause after a warm worker that could not be started."""


@dataclass
class WarmWorker:
    """A process without a role; ``ready`` once everything is imported."""

    name: str
    handle: Any
    node_id: str
    ready: bool = False


class WarmPool:
    """The warm workers of a deployment; belongs to one event loop.

    Args:
        count: how many to keep.
        nodes: asked for the ids of the nodes where actors run, repeated per actor.
        create: starts a worker by name on a node and returns its handle.
    """

    def __init__(
        self,
        count: int,
        nodes: Callable[[], list[str]],
        create: Callable[[str, str], Any],
    ):
        self.count = count
        self._nodes = nodes
        self._create = create
        self._workers: dict[str, WarmWorker] = {}
        self._serial = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False

    @classmethod
    def of(cls, spec: ClusterSpec, nodes: Callable[[], list[str]]) -> WarmPool:
        """The pool that a spec asks for."""
        return cls(
            spec.warm_workers,
            nodes,
            lambda name, node: ray_actors.create_warm_worker(spec, name, node),
        )

    @property
    def ready(self) -> int:
        """Workers that could take a role now."""
        return sum(worker.ready for worker in self._workers.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Every worker, importing ones included."""
        return tuple(self._workers)

    def fill(self) -> None:
        """Start what is missing; from now on the number is kept up."""
        self._open = True
        nodes = self._nodes()
        while len(self._workers) < self.count and nodes:
            crowd = Counter(nodes)
            crowd.subtract(worker.node_id for worker in self._workers.values())
            node_id = crowd.most_common(1)[0][0]
            name = f"{PREFIX}-{self._serial}"
            self._serial += 1
            self._add(name, self._create(name, node_id), node_id)

    def avoid(self, names: Iterable[str]) -> None:
        """Give new workers none of these names: a process keeps its name when it gets a role, and
        Ray frees the name of one that was ended only after a while."""
        for name in names:
            kind, _, number = name.rpartition("-")
            if kind == PREFIX:
                self._serial = max(self._serial, int(number) + 1)

    def adopt(self, name: str, handle: Any, node_id: str) -> None:
        """Take over a worker that an earlier manager has started."""
        self._add(name, handle, node_id)

    def take(self, node_id: str | None) -> WarmWorker | None:
        """A worker for a role on this node: the one that is ready, else one that soon is.

        Whoever takes it owns it; a new one is started in its place, once ``fill`` is called again.
        """
        here = [w for w in self._workers.values() if w.node_id == node_id]
        if not here:
            return None
        chosen = max(here, key=lambda worker: worker.ready)
        return self._workers.pop(chosen.name)

    async def close(self) -> None:
        """End every worker."""
        self._open = False
        for task in self._tasks:
            task.cancel()
        for worker in self._workers.values():
            ray_actors.kill(worker.handle)
        self._workers.clear()

    def _add(self, name: str, handle: Any, node_id: str) -> None:
        worker = self._workers[name] = WarmWorker(name, handle, node_id)
        task = asyncio.ensure_future(self._look_after(worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_after(self, worker: WarmWorker) -> None:
        """Have it import, then notice when it ends before it got a role."""
        try:
            await worker.handle.preload.remote()
            worker.ready = True
            while self._workers.get(worker.name) is worker:
                await worker.handle.watch.remote(0, 5.0)
        except RayError as error:
            if self._workers.get(worker.name) is not worker:
                return
            logger.warning("warm worker %s is gone: %s", worker.name, str(error).split("\n")[0])
            del self._workers[worker.name]
            ray_actors.kill(worker.handle)
            await asyncio.sleep(AGAIN_S)
            if self._open:
                self.fill()
