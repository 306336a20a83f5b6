"""The manager: a detached Ray actor that starts a deployment, changes it, and keeps it whole.

It owns the ``Membership`` (what should happen), the ``Seats`` (making it happen on Ray) and the
``WarmPool``, and tells frontends which attention actors there are. No request passes through it:
serving goes on while it is away, and when Ray starts it anew it reads the truth from the actors.
Not for Ray clusters or HTTP: see ``launcher.py`` and ``frontend.py``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import AffluxError
from cluster import companion, preflight, probing, ray_actors, recovery
from cluster.change import Action, Change, Refused, Times
from cluster.expert_loads import ExpertLoads, imbalance
from cluster.exposition import Exposition
from cluster.membership import Membership
from cluster.names import NAMESPACE, actor_name, manager_name
from cluster.peer_secret import peer_secret
from cluster.placement import Rules
from cluster.seats import ANSWER_S, STOP_S, Seat, SeatGone, Seats, words
from cluster.spec import ROLES, ClusterSpec, Role
from cluster.status import (
    ActorEvent,
    ActorStatus,
    ChangeReport,
    ClusterStatus,
    Health,
    State,
    TopologyStatus,
)
from cluster.warm import WarmPool

logger = logging.getLogger(__name__)

LOADS_S = 5.0
REFILL_S = 3.0
ORPHAN_S = 4.0

EVENTS = 1000
"""Events of actors that are remembered: years of changes must fit into memory."""

BEAT_S = 1.0
"""Seconds between two signs in the metrics that the event loop turns."""

LISTEN_S = 15.0
"""How long a listener hears of requests without asking again: it may be gone."""

NODES_S = 3.0
"""Seconds between two looks at which nodes are about to leave."""

STUCK_S = 20.0
"""Seconds until it is tried again to bring an actor away from such a node."""

LINKS = "links"
"""Under this name measured links are kept."""

AGENTS_S = 10.0
"""Seconds between two looks at which nodes Ray has."""


class StartFailed(AffluxError):
    """The deployment could not be started; the text names the actor and the cause."""

    code = "start_failed"


class OtherSpec(AffluxError):
    """A deployment of this name runs already, with another spec."""

    code = "other_spec"


class Manager:
    """One deployment. Methods are asynchronous and safe to call at any time.

    Args:
        spec: the cluster's spec as JSON data.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = ClusterSpec.model_validate(spec)
        self.membership: Membership | None = None
        self.warm = WarmPool.of(self.spec, self._nodes)
        self.seats = Seats(
            self.spec,
            self.warm,
            on_state=self._on_state,
            on_lost=self._on_lost,
            on_fault=self._on_fault,
            secret=peer_secret(self.spec.name),
        )
        self.loads = ExpertLoads()
        self.exposition = Exposition(self.spec)
        self._incarnation = uuid.uuid4().hex
        self._began = time.monotonic()
        self._health: Health = "starting"
        self._detail = ""
        self._url: str | None = None
        self._serve_app: str | None = None
        self._events: deque[ActorEvent] = deque(maxlen=EVENTS)
        self._version = 0
        self._changed = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._errors: dict[str, AffluxError] = {}  # what a start failed of, by action
        self._queues: dict[str, asyncio.Task[None]] = {}  # the last action of each actor
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alarm: asyncio.TimerHandle | None = None
        self._refill: asyncio.TimerHandle | None = None
        self._running = False  # started, and to be kept as it should be
        self._note_number = 0
        self._telling = False
        self._controller: Any | None = None
        self._listeners: dict[str, tuple[Any, float]] = {}  # name -> handle, until when
        self._kept: dict[str, Any] = {}  # by others, so that it outlives them
        self._took_over = not _restarted()
        if not self._took_over:  # no loop runs yet: have the first call be our own
            ray.get_runtime_context().current_actor.take_over.remote()

    # -- start -----------------------------------------------------------------------------------

    async def start(
        self,
        spec: dict[str, Any],
        *,
        count_frontend: bool = False,
        serve_app: str | None = None,
    ) -> dict[str, Any]:
        """Start everything and return ``members()``; asked again, wait for the same start.

        Args:
            spec: as given to the constructor; a manager serves one spec.
            count_frontend: check that the cluster has room for the frontend's replicas too.
            serve_app: end the deployment when this Serve application is gone.

        Raises:
            OtherSpec: this deployment runs another spec.
            AffluxError: what went wrong and at which actor; nothing is left running.
        """
        await self.take_over()
        if ClusterSpec.model_validate(spec) != self.spec:
            raise OtherSpec(
                f"{self.spec.name} is running with another spec; stop it first "
                f"(afflux down --name {self.spec.name}), or choose another name"
            )
        if serve_app is not None:
            self._serve_app = serve_app
        if self._starting is None:
            self._starting = asyncio.create_task(self._start(count_frontend))
        await asyncio.shield(self._starting)
        return self._members_now()

    async def _start(self, count_frontend: bool) -> None:
        try:
            self._expose()
            checkpoint = await asyncio.to_thread(preflight.check_model, self.spec)
            ray_actors.check_room(self.spec, count_frontend=count_frontend)
            await self._probe(again=False)
            self.membership = self._new_membership(checkpoint)
            change = self.membership.start(self._now())
            await self._ended(change)
            if change.phase != "done":
                raise self._start_error(change)
        except BaseException as error:
            failure = self._explain(error)
            self._health, self._detail = "failed", failure.message
            await self._tear_down()
            self._note(None, "failed", failure.message)
            raise failure from None
        self._note(None, "ready", f"epoch {self.membership.epoch}")
        self._run()

    def _run(self) -> None:
        """From now on keep things as they should be."""
        self._running = True
        self._errors.clear()
        self._judge()
        self._bump()
        self.warm.fill()
        self._spawn(self._gather_loads())
        self._spawn(self._watch_serve())
        self._spawn(self._watch_nodes())
        self._spawn(self._start_controller())

    async def _start_controller(self) -> None:
        self._controller = await asyncio.to_thread(companion.start, self.spec)
        if self._controller is not None:
            self._bump()  # frontends report to it

    def _new_membership(self, checkpoint: Any) -> Membership:
        spec, ms = self.spec, self.spec.membership
        each = self.seats.expert_bytes = _expert_bytes(checkpoint)
        self.seats.siting.hidden_size = checkpoint.hidden
        budget = spec.ffn.expert_memory_gib
        return Membership(
            checkpoint.moe_layers,
            checkpoint.num_experts,
            targets={role: spec.pool(role).count for role in ROLES},
            limits={role: (spec.pool(role).min, spec.pool(role).max) for role in ROLES},
            rules=Rules(
                min_replicas=spec.ffn.min_replicas,
                redundant=spec.ffn.redundant_experts,
                slots=None if budget is None else int(budget * 2**30 / each),
            ),
            times=Times(
                prepare_s=ms.prepare_s,
                commit_s=ms.commit_s,
                drain_s=ms.drain_s,
                start_s=spec.startup_timeout_s,
            ),
            replace_lost=ms.replace_lost,
            wall=time.time() - time.monotonic(),
            on_change=self._on_change,
        )

    async def take_over(self) -> None:
        """After Ray has started this process anew: find out what there is, and go on with it."""
        if self._took_over:
            return
        if self._starting is None or (self._starting.done() and self._starting.exception()):
            self._starting = asyncio.create_task(self._recover())
        await asyncio.shield(self._starting)

    async def _recover(self) -> None:
        try:
            found = await recovery.look_around(self.spec)
            if found.note is None:  # the one before had started nothing
                self._took_over, self._starting = True, None
                return
            checkpoint = await asyncio.to_thread(preflight.check_model, self.spec)
            self.membership = self._new_membership(checkpoint)
            self._url, self._serve_app = found.note.get("url"), found.note.get("serve_app")
            self._kept = dict(found.note.get("kept") or {})
            self.seats.siting.use_links(self._kept.get(LINKS) or ())
            self._note_number = found.note["number"]
            try:
                self._expose(found.note.get("metrics_port"))
            except AffluxError as error:  # what serves need not suffer from it
                logger.error("serving goes on without the manager's metrics: %s", error)
            self.warm.avoid(found.names)
            for name, handle, node_id in found.warm:
                self.warm.adopt(name, handle, node_id)
            for seat in found.seats:
                self.seats.by_name[seat.name] = seat
                if seat.state == "ready":
                    self.seats.watch(seat)
            recovery.restore(self.membership, found, self._now())
            self._took_over = True
        except Exception as error:
            logger.exception("could not take over %s", self.spec.name)
            self.membership = None
            self._health, self._detail = "failed", f"the manager could not take over: {error}"
            raise
        self._note(None, "ready", f"took over {len(found.seats)} actors")
        self._pump()
        self._run()

    def _start_error(self, change: Change) -> AffluxError:
        label = change.error.partition(":")[0]
        known = self._errors.get(label)
        if known is not None:
            return known
        if change.error.startswith("not prepared within"):
            return self._explain_timeout()
        return StartFailed(change.error)

    def _explain(self, error: BaseException) -> AffluxError:
        if isinstance(error, AffluxError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return StartFailed(f"the start of {self.spec.name} was called off", "called_off")
        logger.error("start failed", exc_info=error)
        return StartFailed(f"{type(error).__name__}: {error}")

    def _explain_timeout(self) -> AffluxError:
        seats = self.seats.by_name.values()
        late = [f"{seat.name} is {seat.state}" for seat in seats if seat.state != "ready"]
        homeless = {seat.name for seat in seats if seat.node_id is None}
        wanted = [need for need in preflight.needs(self.spec) if need.what in homeless]
        lines = preflight.lacking(wanted, ray_actors.free_nodes())
        return StartFailed(
            f"{self.spec.name} was not ready within {self.spec.startup_timeout_s:g} s: "
            f"{', '.join(late)}{''.join(f'{chr(10)}  {line}' for line in lines)}\n"
            "see the actors' logs, or raise startup_timeout_s",
            "start_timeout",
        )

    # -- verbs -----------------------------------------------------------------------------------

    async def scale(self, attention: int | None = None, ffn: int | None = None) -> ChangeReport:
        """Have this many actors of each role given; returns at once.

        Raises:
            Refused: outside of the spec's bounds.
        """
        wanted: dict[Role, int] = {}
        if attention is not None:
            wanted["attention"] = attention
        if ffn is not None:
            wanted["ffn"] = ffn
        return await self._order(lambda core: core.scale(wanted, self._now()))

    async def retire(self, actor: str, replace: bool = False) -> ChangeReport:
        """Let an actor go; returns at once. Raises Refused."""
        return await self._order(lambda core: core.retire(actor, self._now(), replace=replace))

    async def flip(self, actor: str, to: Role) -> ChangeReport:
        """Turn an actor of one role into one of the other; returns at once. Raises Refused."""
        room = await asyncio.to_thread(self._room_for, to)
        return await self._order(lambda core: core.flip(actor, to, self._now(), room=room))

    async def rebalance(self) -> ChangeReport:
        """Place the experts anew by measured load; returns at once."""
        await self._take_loads()
        return await self._order(lambda core: core.rebalance(self._now()))

    async def change(self, number: int, timeout_s: float = 0.0) -> ChangeReport:
        """A change by its number; waits until it has ended, at most ``timeout_s``.

        Raises:
            AffluxError: code ``unknown_change``.
        """
        core = await self._ready_core()
        change = core.change_by_number(number)
        if change is None:
            for report in core.past:
                if report.number == number:
                    return report
            raise AffluxError(f"there is no change {number}", code="unknown_change")
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._ended(change)
        return core.report(change)

    async def history(self, limit: int = 50) -> list[ChangeReport]:
        """The last changes, newest last."""
        core = await self._ready_core()
        return core.reports(limit)

    async def _order(self, give: Callable[[Membership], Change]) -> ChangeReport:
        await self.take_over()
        core = self.membership
        if core is None or core.table is None:
            raise AffluxError(
                f"{self.spec.name} is {self._health}; wait until it is ready", code="not_ready"
            )
        change = give(core)
        self._pump()
        return core.report(change)

    async def _ready_core(self) -> Membership:
        await self.take_over()
        if self.membership is None:
            raise AffluxError(f"{self.spec.name} is {self._health}", code="not_ready")
        return self.membership

    def _room_for(self, role: Role) -> bool:
        try:
            ray_actors.check_one_more(self.spec, role)
        except preflight.LackingResources:
            return False
        return True

    # -- for the controller ----------------------------------------------------------------------

    async def situation(
        self, since: int = 0, controller: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """What a controller has to know of the membership.

        Args:
            since: number of the newest change whose end the caller knows.
            controller: where its metrics are bound ("host:port" as ``metrics``) and the address of
                its node (``node_ip``).

        Returns:
            ``health``; ``targets`` by role; ``members``: (name, role, state) of those that live or
            start; ``epoch``; ``change``: the report of the change under way, or None; ``ended``:
            reports of changes above ``since`` that have ended; ``imbalance``: load of the busiest
            FFN actor over the mean by the experts' measured loads, nan while unknown.

        Raises:
            AffluxError: code ``not_ready``.
        """
        if controller is not None:
            self.exposition.hear_controller(controller)
        core = await self._ready_core()
        states = ("starting", "ready", "draining")
        return {
            "health": self._health,
            "targets": dict(core.targets),
            "members": [
                (m.name, m.role, m.state) for m in core.members.values() if m.state in states
            ],
            "epoch": core.epoch,
            "change": core.report(core.change) if core.change is not None else None,
            "ended": [r for r in core.reports(50) if r.number > since and r.ended],
            "imbalance": imbalance(core.loads, core.table),
        }

    async def rebalanced(self) -> float:
        """The imbalance that would be left after a rebalance; nan while loads are unknown."""
        core = await self._ready_core()
        return imbalance(core.loads, core.rebalanced())

    async def room(self, role: Role) -> str:
        """Why the Ray cluster has no place for one more actor of a role; empty when it has."""
        try:
            await asyncio.to_thread(ray_actors.check_one_more, self.spec, role)
        except preflight.LackingResources as error:
            return str(error)
        return ""

    async def workers(self) -> dict[str, tuple[Role, Any, str]]:
        """Those who can be asked for telemetry: name -> (role, Ray handle, state)."""
        core = await self._ready_core()
        found: dict[str, tuple[Role, Any, str]] = {}
        for member in core.members.values():
            seat = self.seats.by_name.get(member.name)
            if member.state in ("ready", "draining") and seat is not None and seat.handle:
                found[member.name] = (member.role, seat.handle, member.state)
        return found

    async def listen(self, name: str, listener: Any) -> None:
        """Have frontends report their requests to an actor too; ask again within ``LISTEN_S``.

        Args:
            name: to know it by. listener: Ray handle of an actor with an asynchronous
                ``take_requests(frontend, batch)``, see ``cluster.reporting``.
        """
        new = name not in self._listening()
        self._listeners[name] = (listener, time.monotonic() + LISTEN_S)
        if new:
            self._bump()

    async def unlisten(self, name: str) -> None:
        """No more reports to this one; idempotent."""
        if self._listeners.pop(name, None) is not None:
            self._bump()

    def _listening(self) -> dict[str, Any]:
        now = time.monotonic()
        return {name: actor for name, (actor, until) in self._listeners.items() if until > now}

    async def keep(self, key: str, data: Any) -> None:
        """Remember plain data for somebody else, also through restarts of either."""
        self._kept[key] = data
        self._spawn(self._tell())

    async def kept(self, key: str) -> Any:
        """What was given to ``keep``; None if nothing was."""
        await self.take_over()
        return self._kept.get(key)

    # -- carrying out ----------------------------------------------------------------------------

    def _pump(self) -> None:
        """Hand out what the membership wants done, and wake up at its next deadline."""
        core = self.membership
        if core is None:
            return
        for action in core.actions():
            # A drain only waits: what the actor must do meanwhile (adopt, stop) goes past it.
            alone = action.fence or action.kind == "drain"
            before = None if alone else self._queues.get(action.actor)
            task = self._spawn(self._carry_out(core, action, before))
            if action.kind != "drain":
                self._queues[action.actor] = task
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        deadline = core.next_deadline()
        if deadline is not None:
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(max(0.0, deadline - self._now()), self._tick)
        self._show()

    def _tick(self) -> None:
        if self.membership is not None:
            self.membership.tick(self._now() + 1e-3)
            self._pump()

    async def _carry_out(
        self, core: Membership, action: Action, before: asyncio.Task[None] | None
    ) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])  # an actor's actions keep their order
        try:
            await self._perform(action)
        except SeatGone as error:
            self._lose(error.name, error.message)
            core.failed(action.number, error.message, self._now())
        except AffluxError as error:
            if not self._running:
                self._errors[action.label] = error
            core.failed(action.number, error.message, self._now())
        except Exception as error:
            logger.exception("%s failed", action.label)
            core.failed(action.number, words(error), self._now())
        else:
            core.done(action.number, self._now())
        finally:
            self._pump()

    async def _perform(self, action: Action) -> None:
        seats, name = self.seats, action.actor
        match action.kind:
            case "start":
                await seats.start(name, action.role, action.experts, action.epoch, action.sources)
            case "grow":
                await seats.grow(name, action.experts, action.sources)
            case "connect":
                await seats.connect(name, action.peer)
                for seat in (seats.by_name[name], seats.by_name[action.peer]):
                    if seat.state == "loading":
                        seats.set_state(seat, "connected")
            case "publish":
                assert action.table is not None
                await seats.publish(name, action.table)
            case "keep":
                await seats.keep(name, action.experts, action.epoch)
            case "drain":
                await seats.drain(name)
            case "disconnect":
                await seats.disconnect(name, action.peer)
            case "stop":
                await seats.stop(name, fence=action.fence)
                self._queues.pop(name, None)
                seats.forget_oldest()

    # -- news ------------------------------------------------------------------------------------

    def _on_lost(self, name: str, why: str) -> None:
        self._lose(name, why)
        self._pump()

    def _on_fault(self, reporter: str, fault: Any) -> None:
        known = self.membership.members.get(reporter) if self.membership is not None else None
        if known is None or known.state in ("failed", "retired"):
            return  # who is being ended loses everybody
        if fault.kind in ("lost", "silent"):
            self._lose(fault.peer, f"{fault.kind}, says {reporter}: {fault.detail}")
            self._pump()

    def _lose(self, name: str, why: str) -> None:
        core, seat = self.membership, self.seats.by_name.get(name)
        known = core.members.get(name) if core is not None else None
        if core is None or known is None or known.state in ("failed", "retired"):
            return
        logger.warning("lost %s: %s", name, why)
        if seat is not None:
            self.seats.set_state(seat, "failed", why)
            if seat.node_ip is not None:
                self.seats.siting.avoid(seat.node_ip)
        core.lost(name, why, self._now())

    def _on_state(self, seat: Seat, state: State, detail: str) -> None:
        self._note(seat, state, detail)
        self._show()

    def _on_change(self) -> None:
        """Members, table or a change's phase have changed."""
        core = self.membership
        if core is None:
            return
        for seat in self.seats.by_name.values():
            member = core.members.get(seat.name)
            if member is None or seat.state == member.state:
                continue
            if member.state in ("ready", "draining") and seat.handle is not None:
                self.seats.set_state(seat, member.state)
        self._judge()
        self._bump()
        self._fill_later()
        if not self._telling:
            self._telling = True
            self._spawn(self._tell())

    def _fill_later(self) -> None:
        """Make up for used warm workers once nothing changes: a new process costs a core."""
        if self._refill is not None:
            self._refill.cancel()
        loop = asyncio.get_running_loop()
        self._refill = loop.call_later(REFILL_S, self._fill)

    def _fill(self) -> None:
        core = self.membership
        if core is None or core.table is None or not self._running:
            return
        if core.change is not None:
            self._fill_later()
        else:
            self.warm.fill()

    async def _tell(self) -> None:
        """Leave a note with every worker, for a manager that has to start anew."""
        await asyncio.sleep(0)  # several changes in one go are one note
        self._telling = False
        core = self.membership
        if core is None:
            return
        self._note_number += 1
        port = self.exposition.port
        note = recovery.note(core, self._note_number, self._url, self._serve_app, port, self._kept)
        for seat in self.seats.by_name.values():
            if seat.handle is not None:
                self._spawn(_quietly(seat.handle.remember.remote(note)))

    def _judge(self) -> None:
        core = self.membership
        if core is None or core.table is None:
            return
        attention = core.ready("attention")
        missing = [f"{n} {role}" for role, n in core.missing().items()]
        what = f"gone: {', '.join(core.gone)}; " if core.gone else ""
        if not attention:
            self._health, self._detail = "failed", f"{what}no attention actor is ready"
        elif core.orphans:
            self._health = "failed"
            self._detail = f"{what}{core.orphans} experts have no live holder; requests wait"
        elif missing:
            self._health, self._detail = "degraded", f"{what}missing: {', '.join(missing)}"
        else:
            self._health, self._detail = "ready", ""

    async def _ended(self, change: Change) -> None:
        self._pump()
        while not change.ended:
            await self._changed.wait()

    # -- metrics ---------------------------------------------------------------------------------

    def _expose(self, port: int | None = None) -> None:
        """Serve metrics from now on; raises AffluxError with code ``bad_metrics_address``."""
        if self.spec.metrics.enabled:
            self.exposition.open(ray_actors.node_ip(), port)
            self._spawn(self._beat())
            self._spawn(self._find_agents())

    def _show(self) -> None:
        seats = self.seats.by_name.values()
        present = [
            seat.name for seat in seats if seat.state not in ("retired", "failed", "stopped")
        ]
        slowness = self.seats.siting.slowness(present)
        self.exposition.show(self.membership, seats, self._health, self.warm.ready, slowness)

    async def _beat(self) -> None:
        while True:
            self._show()
            await asyncio.sleep(BEAT_S)

    async def _find_agents(self) -> None:
        while True:
            try:
                self.exposition.ray_agents = await asyncio.to_thread(ray_actors.metrics_agents)
            except RayError as error:  # the list stays as it was
                logger.warning("Ray does not say which nodes there are: %s", words(error))
            await asyncio.sleep(AGENTS_S)

    # -- measured load ---------------------------------------------------------------------------

    async def _gather_loads(self) -> None:
        while True:
            await asyncio.sleep(LOADS_S)
            await self._take_loads()

    async def _take_loads(self) -> None:
        core = self.membership
        if core is None:
            return
        for member in core.ready("ffn"):
            seat = self.seats.by_name.get(member.name)
            if seat is None or seat.handle is None:
                continue
            with suppress(TimeoutError, RayError):
                async with asyncio.timeout(ANSWER_S):
                    self.loads.take(seat.name, await seat.handle.loads.remote(), self._now())
        core.loads = self.loads.current(core.layers, core.num_experts)

    async def _watch_serve(self) -> None:
        """End with the Serve application that this deployment belongs to."""
        while True:
            await asyncio.sleep(ORPHAN_S)
            if self._serve_app is not None and await self._orphaned():
                logger.warning("Serve application %s is gone; stopping", self._serve_app)
                await self.stop()
                ray_actors.kill(ray.get_runtime_context().current_actor)

    async def _watch_nodes(self) -> None:
        """Empty nodes that are about to leave: a spot instance's notice, ``ray drain-node``."""
        stuck: dict[str, float] = {}
        while True:
            await asyncio.sleep(NODES_S)
            try:
                leaving = await asyncio.to_thread(ray_actors.leaving_nodes)
            except Exception as error:  # Ray's head is away
                logger.warning("Ray does not say which nodes leave: %s", words(error))
                continue
            names = [
                seat.name
                for seat in self.seats.by_name.values()
                if seat.node_id in leaving
                and seat.state == "ready"
                and stuck.get(seat.name, 0.0) < self._now()
            ]
            if names and self.membership is not None:
                await self._evacuate(self.membership, names)
                stuck |= {name: self._now() + STUCK_S for name in names}

    async def _evacuate(self, core: Membership, names: list[str]) -> None:
        """Have others take the place of actors, or where there is no room, their work."""
        logger.warning("the node of %s is leaving", ", ".join(names))
        try:
            change = core.evacuate(names, self._now())
        except Refused as error:
            logger.warning("%s can't be replaced: %s", ", ".join(names), error.message)
            return
        await self._ended(change)
        if change.phase != "rolled_back":
            return
        logger.warning("%s can't be replaced: %s", ", ".join(names), change.error)
        for name in names:
            if await asyncio.to_thread(self._room_for, core.members[name].role):
                continue  # something else went wrong: it is tried again
            try:
                await self._ended(core.retire(name, self._now()))
            except Refused as error:  # when the node goes, it is lost like any other
                logger.warning("%s stays: %s", name, error.message)

    async def _orphaned(self) -> bool:
        from ray import serve

        try:
            async with asyncio.timeout(ANSWER_S):
                status = await asyncio.to_thread(serve.status)
        except TimeoutError:
            return False
        except Exception:  # Serve itself has been shut down
            return True
        app = status.applications.get(self._serve_app)
        return app is None or app.status == "DELETING"

    # -- what others ask -------------------------------------------------------------------------

    async def members(
        self,
        version: str = "",
        timeout_s: float = 0.0,
        frontend: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """The attention actors that serve requests.

        Args:
            version: what the caller has; waits until there is something else ...
            timeout_s: ... for at most this long.
            frontend: who asks (``name``), where its metrics are bound ("host:port" as ``metrics``),
                and the address of its node (``node_ip``).

        Returns:
            ``version``: to be compared for equality only; ``attention``: name -> Ray handle;
            ``draining``: names among them that take no new requests; ``not_ready``: None, or why
            requests can't be served; ``controller``: who wants to hear of requests, or None;
            ``listeners``: name -> Ray handle of others who do (``listen``).
        """
        if frontend is not None:
            self.exposition.hear(frontend)
        await self.take_over()
        deadline = time.monotonic() + timeout_s
        while version == self._version_text and (left := deadline - time.monotonic()) > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return self._members_now()

    def _members_now(self) -> dict[str, Any]:
        core = self.membership
        live = core.live("attention") if core is not None else []
        handles = {m.name: self.seats.by_name[m.name].handle for m in live}
        healthy = self._health in ("ready", "degraded")
        return {
            "version": self._version_text,
            "attention": {name: handle for name, handle in handles.items() if handle is not None},
            "draining": [member.name for member in live if member.state == "draining"],
            "not_ready": None if healthy else self._detail or f"{self.spec.name} {self._health}",
            "controller": self._controller,
            "listeners": self._listening(),
        }

    @property
    def _version_text(self) -> str:
        return f"{self._incarnation}.{self._version}"

    async def set_url(self, url: str) -> None:
        """Remember where the frontend listens, for ``status``."""
        self._url = url
        self._on_change()

    async def events(self, since: int = 0, timeout_s: float = 0.0) -> list[ActorEvent]:
        """Events with a number above ``since``; waits up to ``timeout_s`` for the first.

        Of the newest ``EVENTS``; older ones are forgotten.
        """
        deadline = time.monotonic() + timeout_s
        while self._noted() <= since and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return [event for event in self._events if event.number > since]

    async def spec_data(self) -> dict[str, Any]:
        """The spec that this manager serves, as JSON data."""
        return self.spec.model_dump(mode="json")

    async def status(self) -> ClusterStatus:
        """Everything about the deployment; asks the actors, each with a deadline."""
        await self.take_over()
        seats = [seat for seat in self.seats.by_name.values() if self._shown(seat)]
        alive = [seat for seat in seats if seat.handle is not None and seat.state != "failed"]
        await asyncio.gather(*(self.seats.refresh(seat) for seat in alive))
        core = self.membership
        return ClusterStatus(
            name=self.spec.name,
            url=self._url,
            health=self._health,
            epoch=core.table.epoch if core is not None and core.table else None,
            lanes=self.spec.lanes,
            model=self.spec.served_name,
            actors=tuple(self._describe(seat) for seat in seats),
            targets=dict(core.targets) if core is not None else {},
            change=core.report(core.change) if core is not None and core.change else None,
            warm=self.warm.ready,
            warm_target=self.spec.warm_workers,
            emulated=self.spec.emulate is not None,
            manager_pid=os.getpid(),
            metrics_url=self.exposition.url,
            detail=self._detail,
        )

    async def _probe(self, *, again: bool) -> None:
        """Measure the links between nodes; where that fails, their labels have to do."""
        if not (self.spec.transport.probe_links or again):
            return
        try:
            here = ray_actors.node_ip()
            nodes = await asyncio.to_thread(ray_actors.nodes_for, self.spec, here)
            links = await probing.probe(self.spec, nodes)
        except Exception:
            logger.exception("links were not measured")
            return
        if not links:
            return
        found = [
            (a, b, link.latency_s, link.bytes_per_s)
            for (a, b), link in ((sorted(pair), link) for pair, link in links.items())
        ]
        self.seats.siting.use_links(found)
        await self.keep(LINKS, found)

    async def topology(self, probe: bool = False) -> TopologyStatus:
        """How far apart the actors are, and what that costs.

        Args:
            probe: measure the links between nodes first.
        """
        await self.take_over()
        if probe:
            await self._probe(again=True)
        actors = {
            seat.name: (seat.role, seat.node_ip)
            for seat in self.seats.by_name.values()
            if seat.handle is not None and seat.node_ip is not None
        }
        return await asyncio.to_thread(self.seats.siting.report, actors)

    def _shown(self, seat: Seat) -> bool:
        core = self.membership
        member = core.members.get(seat.name) if core is not None else None
        if core is None or member is None:
            return True
        return member.state not in ("retired", "failed") or seat.name in core.gone

    def _describe(self, seat: Seat) -> ActorStatus:
        info = seat.info or {}
        table = self.membership.table if self.membership is not None else None
        held = table.shard(seat.name) if table is not None else {}
        counts = {layer: len(experts) for layer, experts in held.items()}
        is_ffn = seat.role == "ffn" and table is not None
        return ActorStatus(
            name=seat.name,
            role=seat.role,
            state=seat.state,
            node=info.get("host"),
            node_ip=seat.node_ip,
            pid=seat.pid,
            placement_group=seat.group.id.hex() if seat.group else None,
            resources=self.spec.pool(seat.role).resources.bundle(),
            experts=counts if is_ffn else None,
            expert_total=sum(counts.values()) if is_ffn else None,
            allocated_bytes=info.get("allocated_bytes", info.get("weight_bytes")),
            peers=tuple(info.get("peers", ())),
            detail=seat.detail or info.get("last_error") or "",
        )

    # -- stop ------------------------------------------------------------------------------------

    async def stop(self) -> list[ActorStatus]:
        """End every actor and remove its place; returns what was running. Idempotent."""
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting], timeout=STOP_S)
        seats = [seat for seat in self.seats.by_name.values() if seat.handle is not None]
        running = [self._describe(seat) for seat in seats]
        await self._tear_down()
        self._health, self._detail = "stopped", ""
        self._bump()
        return running

    async def _tear_down(self) -> None:
        self.membership = None
        self._running = False
        for timer in (self._alarm, self._refill):
            if timer is not None:
                timer.cancel()
        mine = asyncio.current_task()
        for task in list(self._tasks):
            if task is not mine:
                task.cancel()
        await asyncio.to_thread(companion.end, self.spec.name)
        await self.warm.close()
        await asyncio.to_thread(self.exposition.close)
        seats = list(self.seats.by_name.values())
        stops = (self.seats.stop(s.name, fence=s.state == "failed", final="stopped") for s in seats)
        await asyncio.gather(*stops, return_exceptions=True)
        await asyncio.to_thread(ray_actors.remove_groups, self.spec.name)

    # -- small things ----------------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        """Nodes where actors run, once per actor."""
        seats = self.seats.by_name.values()
        return [seat.node_id for seat in seats if seat.handle is not None and seat.node_id]

    def _noted(self) -> int:
        """How many events there were, those forgotten included."""
        return self._events[-1].number if self._events else 0

    def _note(self, seat: Seat | None, state: State, detail: str) -> None:
        self._events.append(
            ActorEvent(
                actor=seat.name if seat else "",
                role=seat.role if seat else None,
                state=state,
                detail=detail,
                seconds=self._now() - self._began,
                number=self._noted() + 1,
            )
        )

    def _bump(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def _now(self) -> float:
        return time.monotonic()

    def _spawn(self, work: Awaitable[Any]) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task  # type: ignore[return-value]


def connect_manager(spec: ClusterSpec) -> Any:
    """The Ray handle of the deployment's manager, which is created if there is none."""
    options = {
        "name": manager_name(spec.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "label_selector": dict(spec.frontend.labels),
        "max_restarts": -1,
        "enable_task_events": False,  # see ray_actors
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
    }
    return ray.remote(Manager).options(**options).remote(spec.model_dump(mode="json"))


def find_manager(name: str) -> Any | None:
    """The Ray handle of a deployment's manager, or None."""
    try:
        return ray.get_actor(manager_name(name), namespace=NAMESPACE)
    except ValueError:
        return None


def find_actor(deployment: str, member: str) -> Any | None:
    """The Ray handle of a worker by its name (``ffn-0``, or ``warm-1`` if it began so), or None."""
    try:
        return ray.get_actor(actor_name(deployment, member), namespace=NAMESPACE)
    except ValueError:
        return None


def _restarted() -> bool:
    """Whether Ray has started this actor anew after it died."""
    if not ray.is_initialized():
        return False
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _expert_bytes(checkpoint: Any) -> float:
    """Bytes of one expert of one layer, as the checkpoint has it."""
    total = sum(checkpoint.tensors[name].nbytes for name in checkpoint.experts)
    return total / (len(checkpoint.moe_layers) * checkpoint.num_experts)


async def _quietly(call: Awaitable[Any]) -> None:
    with suppress(RayError):
        await call
