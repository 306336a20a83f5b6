"""Seats: the place (placement group) and the process of every member, and what is asked of it.

Carries out what ``membership`` wants done, one method per kind of action, and watches that every
process is alive. Decides nothing. An actor that turns out to be dead raises ``SeatGone``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster import configs, ray_actors
from cluster.preflight import LackingResources
from cluster.siting import Siting
from cluster.spec import ClusterSpec, Role
from cluster.status import State
from cluster.topology import Site
from cluster.warm import WarmPool

logger = logging.getLogger(__name__)
T = TypeVar("T")

STOP_S = 4.0
ANSWER_S = 5.0
WATCH_S = 2.0
ROOM_GRACE_S = 2.0
"""Seconds that resources which are being given back may take before a start is refused."""

AWAITING_NODE = "no node has room for it yet; Ray's autoscaler may add one"

DRAIN_POLL_S = 0.1
KEPT = 50
"""Ended seats that are remembered."""

Shard = Mapping[int, Sequence[int]]
Sources = Mapping[str, Shard]


class SeatError(AffluxError):
    """An actor could not do what it was asked; the text names it and the cause."""

    code = "start_failed"


class SeatGone(AffluxError):
    """The process of ``name`` has ended."""

    code = "actor_gone"

    def __init__(self, message: str, code: str | None = None, name: str = ""):
        super().__init__(message, code)
        self.name = name


@dataclass
class Seat:
    """One member's place and process; ``name`` is short, as in ``ffn-0``."""

    name: str
    role: Role
    state: State = "pending"
    detail: str = ""
    group: Any = None
    handle: Any = None
    info: dict[str, Any] | None = None
    node_id: str | None = None
    node_ip: str | None = None
    pid: int | None = None
    began: float = 0.0
    watcher: asyncio.Task[None] | None = None


class Seats:
    """All seats of a deployment; belongs to one event loop.

    Args:
        spec: the deployment's.
        warm: where processes come from that need not be started.
        on_state: called with (seat, state, detail) at every step of a seat's life.
        on_lost: called with (name, why) when an actor is found to be gone or silent.
        on_fault: called with (name of the attention actor, its report of an FFN actor's fault).
        secret: what the deployment's actors know each other by.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        warm: WarmPool,
        *,
        on_state: Callable[[Seat, State, str], None],
        on_lost: Callable[[str, str], None],
        on_fault: Callable[[str, Any], None],
        secret: bytes,
    ):
        self.spec = spec
        self.warm = warm
        self.by_name: dict[str, Seat] = {}
        self.expert_bytes = 0.0  # of one expert of one layer, once the checkpoint was read
        self.siting = Siting(
            spec,
            lambda: ray_actors.sites(),
            self._present,
            self._address,
            lambda: ray_actors.node_ip(),
        )
        self._on_state = on_state
        self._on_lost = on_lost
        self._on_fault = on_fault
        self._secret = secret

    # -- the kinds of actions --------------------------------------------------------------------

    async def start(
        self, name: str, role: Role, experts: Shard, epoch: int, sources: Sources | None = None
    ) -> None:
        """Find a place and a process for an actor, and have it load.

        Args:
            experts: what an FFN actor is to hold, from ``epoch`` on.
            sources: FFN actors that have some of it in memory.

        Raises:
            LackingResources: the cluster has no room, and no autoscaler that could make some.
            SeatError: it refused to start. SeatGone: its process ended.
        """
        seat = self.by_name[name] = Seat(name, role, began=time.monotonic())
        self.set_state(seat, "pending")
        await self._place(seat)
        self.set_state(seat, "placed")
        devices = await self._process(seat)
        place = await asyncio.to_thread(ray_actors.where, seat.handle)
        seat.node_id, seat.node_ip, seat.pid = place[0] or seat.node_id, place[1], place[2]
        if role == "attention":
            known = configs.attention_config(
                self.spec, name, secret=self._secret, address=seat.node_ip
            )
            await self._load(seat, known, devices)
        else:
            async with self._offers(sources or {}, experts) as offers:
                config = configs.ffn_config(
                    self.spec,
                    name,
                    experts,
                    epoch,
                    offers,
                    secret=self._secret,
                    address=seat.node_ip,
                )
                await self._load(seat, config, devices)
        self.set_state(seat, "loading", "loaded")
        self.watch(seat)

    async def grow(self, name: str, experts: Shard, sources: Sources | None = None) -> None:
        """Have an FFN actor hold more experts, from the checkpoint or from ``sources``' memory."""
        async with self._offers(sources or {}, experts) as offers:
            await self.ask(name, lambda seat: seat.handle.grow.remote(experts, offers))

    async def keep(self, name: str, experts: Shard, epoch: int) -> None:
        """Have an FFN actor drop other experts and refuse older epochs."""
        await self.ask(name, lambda seat: seat.handle.keep.remote(experts, epoch))

    async def connect(self, attention: str, ffn: str) -> None:
        """Have two actors meet; each refuses a peer of another model."""
        theirs = await self.ask(ffn, lambda seat: seat.handle.offer.remote(attention))
        mine = await self.ask(attention, lambda seat: seat.handle.offer.remote(ffn))
        await self.ask(ffn, lambda seat: seat.handle.connect.remote(mine))
        await self.ask(attention, lambda seat: seat.handle.connect.remote(theirs))

    async def disconnect(self, attention: str, ffn: str) -> None:
        """Have whoever of the two is alive forget the other."""
        for name, peer in ((attention, ffn), (ffn, attention)):
            seat = self.by_name.get(name)
            if seat is not None and seat.handle is not None and seat.state != "failed":
                with suppress(RayError, TimeoutError):
                    async with asyncio.timeout(ANSWER_S):
                        await seat.handle.disconnect.remote(peer)

    async def publish(self, name: str, table: ExpertTable) -> None:
        """Have an attention actor adopt a table; returns when it is in use."""
        await self.ask(name, lambda seat: seat.handle.adopt.remote(table))

    async def drain(self, name: str) -> None:
        """Wait until an attention actor has no requests."""
        empty = 0
        while empty < 2:  # one look may fall between a frontend's choice and its request
            facts = await self.ask(name, lambda seat: seat.handle.info.remote())
            empty = 0 if facts.get("running", 0) + facts.get("waiting", 0) else empty + 1
            await asyncio.sleep(DRAIN_POLL_S)

    async def stop(self, name: str, *, fence: bool, final: State = "retired") -> None:
        """End an actor's process and give its place back; ``fence``: without asking it."""
        seat = self.by_name.get(name)
        if seat is None:
            return
        if seat.watcher is not None:
            seat.watcher.cancel()
        handle, seat.handle = seat.handle, None
        if handle is not None:
            if not fence:  # a clean end closes connections and unlinks shared memory
                with suppress(RayError, TimeoutError):
                    async with asyncio.timeout(STOP_S):
                        await handle.stop.remote()
            ray_actors.kill(handle)
        group, seat.group = seat.group, None
        if group is not None:
            await asyncio.to_thread(ray_actors.remove_group, group)
        if seat.state != "failed":
            self.set_state(seat, final)

    @asynccontextmanager
    async def _offers(self, sources: Sources, experts: Shard) -> AsyncIterator[list[Any]]:
        """Have holders offer their memory while somebody loads; none when it is not worth it."""
        nbytes = self.expert_bytes * sum(len(ids) for ids in experts.values())
        if nbytes < self.spec.transport.peer_weights_mib * 2**20:
            yield []
            return
        offers: dict[str, Any] = {}
        for name, shard in sources.items():
            with suppress(SeatGone, SeatError):  # the checkpoint has it too
                offers[name] = await self.ask(name, partial(_export, shard=shard))
        try:
            yield list(offers.values())
        finally:
            for name, offer in offers.items():
                with suppress(SeatGone, SeatError):
                    await self.ask(name, partial(_unexport, token=offer.token))

    def forget_oldest(self) -> None:
        """Drop seats that ended long ago; the newest are kept for status."""
        ended = [n for n, s in self.by_name.items() if s.state in ("retired", "failed", "stopped")]
        for name in ended[:-KEPT]:
            if self.by_name[name].handle is None:
                del self.by_name[name]

    # -- steps of a start ------------------------------------------------------------------------

    async def _place(self, seat: Seat) -> None:
        address = await self.siting.node_for(seat.role)
        await self._group(seat, address)
        began = time.monotonic()
        try:
            while not await asyncio.to_thread(seat.group.wait, 1):
                if time.monotonic() - began <= ROOM_GRACE_S:
                    continue
                if address is not None:  # somebody else took it
                    await asyncio.to_thread(ray_actors.remove_group, seat.group)
                    address, began = None, time.monotonic()
                    await self._group(seat, None)
                elif not await asyncio.to_thread(ray_actors.check_one_more, self.spec, seat.role):
                    self._await_node(seat)
        except LackingResources:
            await self.stop(seat.name, fence=True)
            raise
        seat.node_id = await asyncio.to_thread(ray_actors.node_of, seat.group)

    def _await_node(self, seat: Seat) -> None:
        if not seat.detail:
            self.set_state(seat, "pending", AWAITING_NODE)

    async def _group(self, seat: Seat, address: str | None) -> None:
        pool = self.spec.pool(seat.role)
        seat.group = await asyncio.to_thread(
            ray_actors.create_group, self.spec.name, seat.name, pool, address
        )

    def _present(self, role: Role, sites: Sequence[Site]) -> list[Site]:
        by_address = {site.node: site for site in sites}
        return [
            by_address[seat.node_ip]
            for seat in self.by_name.values()
            if seat.role == role and seat.handle is not None and seat.node_ip in by_address
        ]

    def _address(self, name: str) -> str | None:
        seat = self.by_name.get(name)
        return seat.node_ip if seat is not None and seat.handle is not None else None

    async def _process(self, seat: Seat) -> list[int]:
        """Get a process for a seat, warm if there is one; returns the GPUs it has to be told."""
        pool = self.spec.pool(seat.role)
        worker = self.warm.take(seat.node_id)
        while worker is not None:
            self.set_state(seat, "starting", f"as {worker.name}")
            try:
                await worker.handle.ping.remote()
                seat.handle = worker.handle
                if pool.resources.gpus:
                    return await asyncio.to_thread(
                        ray_actors.gpus_of, seat.group, pool.resources.gpus
                    )
                return []
            except RayActorError:
                ray_actors.kill(worker.handle)
                seat.handle = None
                worker = self.warm.take(seat.node_id)
        seat.handle = ray_actors.create_worker(self.spec, seat.role, seat.name, seat.group)
        self.set_state(seat, "importing")
        await self.ask(seat.name, lambda seat: seat.handle.ping.remote())
        return []

    async def _load(self, seat: Seat, config: Any, devices: list[int]) -> None:
        loading = asyncio.ensure_future(
            self.ask(seat.name, lambda seat: seat.handle.start.remote(config, devices))
        )
        try:
            while not loading.done():
                await asyncio.wait([loading], timeout=0.5)
                if not loading.done() and seat.state != "loading":
                    with suppress(TimeoutError, RayError, SeatGone):
                        async with asyncio.timeout(ANSWER_S):
                            if await seat.handle.ping.remote() == "loading":
                                self.set_state(seat, "loading")
            seat.info = loading.result()
        finally:
            loading.cancel()

    # -- watching --------------------------------------------------------------------------------

    def watch(self, seat: Seat) -> None:
        """Notice from now on when the actor ends, falls silent, or reports a fault."""
        seat.watcher = asyncio.ensure_future(self._watch(seat))

    async def _watch(self, seat: Seat) -> None:
        silence_s = self.spec.membership.silence_s
        poll_s = min(WATCH_S, silence_s / 2)
        seen = 0
        while seat.handle is not None:
            try:
                async with asyncio.timeout(poll_s + silence_s):
                    report = await seat.handle.watch.remote(seen, poll_s)
            except TimeoutError:
                self._on_lost(seat.name, f"no sign of life for {silence_s:g} s")
                return
            except RayError as error:
                self._on_lost(seat.name, words(error))
                return
            if report["state"] == "failed":
                self._on_lost(seat.name, report["error"] or "it failed")
                return
            seen = report["number"]
            self.siting.heard(seat.name, report.get("wire_s", {}))
            for fault in report["faults"]:
                self._on_fault(seat.name, fault)

    # -- small things ----------------------------------------------------------------------------

    async def ask(self, name: str, call: Callable[[Seat], Awaitable[T]]) -> T:
        """Call an actor; an error is turned into one that names it.

        Raises:
            SeatError: the actor raised. SeatGone: it is not there (any more).
        """
        seat = self.by_name.get(name)
        if seat is None or seat.handle is None:
            raise SeatGone(f"{name} has no process", name=name)
        try:
            return await call(seat)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            code = cause.code if isinstance(cause, AffluxError) else None
            raise SeatError(f"{name}: {words(cause)}", code) from None
        except RayActorError as error:
            raise SeatGone(f"{name}: its process ended: {words(error)}", name=name) from None

    async def refresh(self, seat: Seat) -> None:
        """Ask an actor for its facts; when it does not answer, say so in the detail."""
        try:
            async with asyncio.timeout(ANSWER_S):
                seat.info = await seat.handle.info.remote()
            seat.detail = ""
        except TimeoutError:
            seat.detail = f"no answer for {ANSWER_S:g} s"
        except RayError as error:
            seat.detail = words(error)

    def set_state(self, seat: Seat, state: State, detail: str = "") -> None:
        """Note a step of a seat's life."""
        if (seat.state, seat.detail) == (state, detail) and state != "pending":
            return
        seat.state, seat.detail = state, detail
        self._on_state(seat, state, detail)


def _export(seat: Seat, shard: Shard) -> Awaitable[Any]:
    return seat.handle.export.remote(shard)


def _unexport(seat: Seat, token: str) -> Awaitable[Any]:
    return seat.handle.unexport.remote(token)


def words(error: BaseException) -> str:
    """The text of an error without Ray's traceback."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, AffluxError):
        return error.message
    text = str(error).strip()
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if isinstance(error, RayError):
        return " ".join(lines[:1] + [line for line in lines[1:] if "exit" in line.lower()][:1])
    return f"{type(error).__name__}: {text}"
