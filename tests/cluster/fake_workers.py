"""Workers without Ray: handles whose methods answer at once, for tests of what the manager decides.

The real ones are in ``actors/worker.py``; ``tests/e2e`` starts them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster import ray_actors
from cluster.topology import Site


class Group:
    """A placement group that is placed at once."""

    def __init__(self, name: str):
        self.name = name
        self.id = self

    def hex(self) -> str:
        return f"group-of-{self.name}"

    def wait(self, seconds: float) -> bool:
        return True


class FakeWorker:
    """One process: remembers what it was asked, and can be killed, frozen or told to fail."""

    def __init__(self, name: str):
        self.name = name
        self.config: Any = None
        self.table: ExpertTable | None = None
        self.peers: set[str] = set()
        self.experts: dict[int, list[int]] = {}
        self.epoch = 0
        self.note: dict[str, Any] = {}
        self.faults: list[Any] = []
        self.stopped = False
        self.dead = asyncio.Event()
        self.frozen = False
        self.fails: dict[str, Exception] = {}
        self.news = asyncio.Event()
        self.requests = 0
        self.calls: list[str] = []
        self.offers: Any = ()

    @property
    def role(self) -> str | None:
        if self.config is None:
            return None
        return "ffn" if hasattr(self.config, "experts") else "attention"

    def __getattr__(self, method: str) -> Any:
        answer = getattr(self, f"_{method}")

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                self.calls.append(method)
                return self._call(method, answer, *args)

        return Method

    async def _call(self, method: str, answer: Callable[..., Any], *args: Any) -> Any:
        if self.frozen:
            await asyncio.Event().wait()
        if self.dead.is_set():
            raise RayActorError()
        if method in self.fails:
            raise self.fails[method]
        work = asyncio.ensure_future(answer(*args))
        dying = asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([work, dying], return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if not work.done():
            work.cancel()
            raise RayActorError()
        return work.result()

    async def _preload(self) -> str:
        return "warm"

    async def _ping(self) -> str:
        return "ready"

    async def _start(self, config: Any, devices: Any = None) -> dict[str, Any]:
        self.config = config
        self.experts = {k: list(v) for k, v in getattr(config, "experts", {}).items()}
        return await self._info()

    async def _info(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "name": self.config.name if self.config else None,
            "state": "ready" if self.config else "warm",
            "peers": sorted(self.peers),
            "epoch": self.table.epoch if self.table else self.epoch,
            "table": self.table,
            "note": self.note,
            "running": self.requests,
            "metrics": f"127.0.0.1:{self.config.name}" if self.config else None,
            "waiting": 0,
        }

    async def _watch(self, seen: int, timeout_s: float) -> dict[str, Any]:
        if len(self.faults) <= seen:
            try:
                await asyncio.wait_for(self.news.wait(), timeout_s)
            except TimeoutError:
                pass
        new = self.faults[seen:]
        return {"state": "ready", "error": None, "faults": new, "number": len(self.faults)}

    async def _remember(self, note: dict[str, Any]) -> None:
        self.note = note

    async def _offer(self, peer: str) -> str:
        return self.config.name

    async def _connect(self, offer: str) -> None:
        self.peers.add(offer)

    async def _disconnect(self, peer: str) -> None:
        self.peers.discard(peer)

    async def _adopt(self, table: ExpertTable) -> int:
        missing = set(table.actors) - self.peers
        if missing:
            raise AffluxError(f"not connected to {missing}", "unknown_peer")
        self.table = table
        return table.epoch

    async def _grow(self, experts: Any, offers: Any = ()) -> None:
        self.offers = offers
        for layer, ids in experts.items():
            self.experts[layer] = sorted({*self.experts.get(layer, []), *ids})

    async def _keep(self, experts: Any, epoch: int) -> None:
        self.experts = {layer: list(ids) for layer, ids in experts.items()}
        self.epoch = epoch

    async def _export(self, experts: Any) -> Any:
        return SimpleNamespace(token=f"{self.name}", experts=experts)

    async def _unexport(self, token: str) -> None:
        return None

    async def _loads(self) -> dict[int, list[float]]:
        return {}

    async def _stop(self) -> None:
        self.stopped = True


class FakeRay:
    """Stands in for ``ray_actors``: processes by name, groups by member."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.workers: dict[str, FakeWorker] = {}
        self.groups: dict[str, Group] = {}
        self.room = True
        self.autoscaled = False
        self.sites: list[Site] = []
        self.find_sites: Callable[[], list[Site]] = lambda: self.sites
        self.asked_for: dict[str, str | None] = {}
        self.full: set[str] = set()
        self.nodes: dict[str, str] = {}  # of workers that are not on "node"
        self.leaving: set[str] = set()
        replacements = {
            "check_room": lambda spec, count_frontend: None,
            "check_one_more": self._check_one_more,
            "create_group": self._create_group,
            "create_worker": lambda spec, role, name, group: self._create(name),
            "create_warm_worker": lambda spec, name, node: self._create(name),
            "sites": lambda: self.find_sites(),
            "node_of": lambda group: "node",
            "where": lambda handle: (
                self.nodes.get(handle.name, "node"),
                "10.0.0.1",
                1000 + len(self.workers),
            ),
            "nodes_for": lambda spec, home: {},
            "leaving_nodes": lambda: set(self.leaving),
            "kill": self._kill,
            "remove_group": lambda group: self.groups.pop(group.name, None),
            "remove_groups": lambda deployment: self.groups.clear(),
            "node_ip": lambda: "10.0.0.1",
            "metrics_agents": lambda: ("10.0.0.1:8090",),
            "workers": lambda deployment: {n: w for n, w in self.workers.items() if self._up(w)},
            "groups": lambda deployment: dict(self.groups),
        }
        for name, replacement in replacements.items():
            patch.setattr(ray_actors, name, replacement)

    def member(self, name: str) -> FakeWorker:
        """The worker that has become a member."""
        return next(w for w in self.workers.values() if w.config and w.config.name == name)

    def _up(self, worker: FakeWorker) -> bool:
        return not worker.dead.is_set()

    def _create(self, name: str) -> FakeWorker:
        if name in self.workers and self._up(self.workers[name]):
            raise ValueError(f"the name {name} is already taken")  # as Ray does
        worker = self.workers[name] = FakeWorker(name)
        return worker

    def _create_group(self, deployment: str, name: str, pool: Any, address: str | None) -> Group:
        group = self.groups[name] = Group(name)
        self.asked_for[name] = address
        if not self.room or address in self.full:
            group.wait = lambda seconds: (  # type: ignore[method-assign]
                self.room and address not in self.full
            )
        return group

    def _check_one_more(self, spec: Any, role: Any) -> bool:
        if not self.room and not self.autoscaled:
            raise ray_actors.LackingResources("CPU: 1 needed, 0 free, 1 lacking")
        return self.room

    def _kill(self, worker: FakeWorker) -> None:
        worker.dead.set()
