"""The manager: a detached Ray actor that starts a deployment's actors, watches and stops them.

It places attention and FFN actors, has them load, makes every pair meet, publishes the expert
table, and tells frontends which attention actors there are. No request passes through it: serving
goes on while it is away. Not for Ray clusters or HTTP: see ``launcher.py`` and ``frontend.py``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster import preflight, ray_actors
from cluster.names import NAMESPACE, actor_name, manager_name
from cluster.placement import experts_of, initial_table
from cluster.spec import ROLES, ClusterSpec, Role
from cluster.status import ActorEvent, ActorStatus, ClusterStatus, Health, State

logger = logging.getLogger(__name__)
T = TypeVar("T")

WATCH_S = 1.0
ANSWER_S = 5.0
STOP_S = 4.0


class StartFailed(AffluxError):
    """The deployment could not be started; the text names the actor and the cause."""

    code = "start_failed"


class OtherSpec(AffluxError):
    """A deployment of this name runs already, with another spec."""

    code = "other_spec"


@dataclass
class Member:
    """An attention or FFN actor; ``name`` is short, as in ``ffn-0``."""

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

    @property
    def alive(self) -> bool:
        """It has a process, as far as is known."""
        return self.handle is not None and self.state not in ("failed", "stopped")


class Manager:
    """One deployment. Methods are asynchronous and safe to call at any time.

    Args:
        spec: the cluster's spec as JSON data.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = ClusterSpec.model_validate(spec)
        self.table: ExpertTable | None = None
        self._members = {
            name: Member(name, role)
            for role in ROLES
            for name in (f"{role}-{i}" for i in range(self.spec.pool(role).count))
        }
        self._health: Health = "starting"
        self._detail = ""
        self._url: str | None = None
        self._began = time.monotonic()
        self._events: list[ActorEvent] = []
        self._version = 0
        self._changed = asyncio.Event()
        self._starting: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._serve_app: str | None = None

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
            async with asyncio.timeout(self.spec.startup_timeout_s):
                await self._bring_up(count_frontend)
        except BaseException as error:
            failure = self._explain(error)
            self._health, self._detail = "failed", str(failure)
            await self._tear_down()
            self._note(None, "failed", str(failure))
            raise failure from None
        self._health = "ready"
        self._note(None, "ready", f"epoch {self.table.epoch if self.table else 0}")
        self._bump()
        self._watching = asyncio.create_task(self._watch())

    async def _bring_up(self, count_frontend: bool) -> None:
        checkpoint = await asyncio.to_thread(preflight.check_model, self.spec)
        ray_actors.check_room(self.spec, count_frontend=count_frontend)
        await asyncio.gather(*(self._place(member) for member in self._members.values()))
        self.table = initial_table(
            checkpoint.moe_layers, checkpoint.num_experts, self._names("ffn")
        )
        await _all(self._load(member) for member in self._members.values())
        await self._introduce()
        for member in self._of("attention"):
            await self._ask(member, member.handle.adopt.remote(self.table))
        for member in self._members.values():
            self._set(member, "ready")

    async def _place(self, member: Member) -> None:
        pool = self.spec.pool(member.role)
        self._set(member, "pending")
        member.group = await asyncio.to_thread(
            ray_actors.create_group, self.spec.name, member.name, pool
        )
        while not await asyncio.to_thread(member.group.wait, 2):
            pass  # the deadline of the whole start ends this
        self._set(member, "placed")

    async def _load(self, member: Member) -> None:
        """Start the process and have it load its part of the model."""
        member.handle = ray_actors.create_actor(self.spec, member.role, member.name, member.group)
        self._set(member, "importing")
        await self._ask(member, member.handle.ping.remote())
        place = await asyncio.to_thread(ray_actors.where, member.handle)
        member.node_id, member.node_ip, member.pid = place
        loading = asyncio.ensure_future(
            self._ask(member, member.handle.start.remote(self._config(member)))
        )
        try:
            while not loading.done():
                await asyncio.wait([loading], timeout=0.5)
                if not loading.done() and member.state != "loading":
                    await self._follow_load(member)
            member.info = loading.result()
        finally:
            loading.cancel()
        self._set(member, "loading", "loaded")

    async def _follow_load(self, member: Member) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                if await member.handle.ping.remote() == "loading":
                    self._set(member, "loading")
        except (TimeoutError, RayError):
            pass  # ``start`` has the real answer

    def _config(self, member: Member) -> Any:
        from actors.engine import AttentionConfig
        from actors.ffn import FFNConfig

        spec = self.spec
        if member.role == "attention":
            return AttentionConfig(
                name=member.name,
                model=spec.model.path,
                dtype=spec.model.dtype,
                engine=dict(spec.attention.engine),
                lanes=None if spec.lanes == "auto" else spec.lanes,
                max_frame_tokens=spec.transport.max_frame_tokens,
                timeout_s=spec.transport.timeout_s,
                ucx_tls=spec.transport.ucx_tls,
            )
        assert self.table is not None
        return FFNConfig(
            name=member.name,
            model=spec.model.path,
            experts=experts_of(self.table, member.name),
            dtype=spec.model.dtype,
            max_frame_tokens=spec.transport.max_frame_tokens,
            threads=ray_actors.cpu_threads(spec.ffn),
            engine_args=dict(spec.ffn.engine),
            device="cuda" if spec.ffn.resources.gpus else "cpu",
            ucx_tls=spec.transport.ucx_tls,
        )

    async def _introduce(self) -> None:
        """Every attention actor meets every FFN actor; each refuses a peer of another model."""
        for attention in self._of("attention"):
            for ffn in self._of("ffn"):
                theirs = await self._ask(ffn, ffn.handle.offer.remote(attention.name))
                mine = await self._ask(attention, attention.handle.offer.remote(ffn.name))
                await self._ask(attention, attention.handle.connect.remote(theirs))
                await self._ask(ffn, ffn.handle.connect.remote(mine))
            self._set(attention, "connected", f"{len(self._of('ffn'))} peers")
        for ffn in self._of("ffn"):
            self._set(ffn, "connected", f"{len(self._of('attention'))} peers")

    async def _ask(self, member: Member, call: Awaitable[T]) -> T:
        """Await a call to an actor; an error is turned into one that names the actor."""
        try:
            return await call
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            text = f"{member.name}: {_words(cause)}"
            self._set(member, "failed", _words(cause))
            code = cause.code if isinstance(cause, AffluxError) else None
            raise StartFailed(text, code) from None
        except RayActorError as error:
            self._set(member, "failed", _words(error))
            raise StartFailed(f"{member.name}: its process ended: {_words(error)}") from None

    def _explain(self, error: BaseException) -> AffluxError:
        if isinstance(error, AffluxError):
            return error
        if isinstance(error, TimeoutError):
            return self._explain_timeout()
        if isinstance(error, asyncio.CancelledError):
            return StartFailed(f"the start of {self.spec.name} was called off", "called_off")
        logger.error("start failed", exc_info=error)
        return StartFailed(f"{type(error).__name__}: {error}")

    def _explain_timeout(self) -> AffluxError:
        late = [f"{m.name} is {m.state}" for m in self._members.values() if m.state != "ready"]
        homeless = {m.name for m in self._members.values() if m.state == "pending"}
        wanted = [need for need in preflight.needs(self.spec) if need.what in homeless]
        lines = preflight.lacking(wanted, ray_actors.free_nodes())
        return StartFailed(
            f"{self.spec.name} was not ready within {self.spec.startup_timeout_s:g} s: "
            f"{', '.join(late)}{''.join(f'{chr(10)}  {line}' for line in lines)}\n"
            "see the actors' logs, or raise startup_timeout_s",
            "start_timeout",
        )

    # -- watch -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Notice actors that are gone, and a Serve application that was deleted."""
        turn = 0
        while True:
            await asyncio.sleep(WATCH_S)
            await asyncio.gather(*(self._check(m) for m in self._members.values() if m.alive))
            self._judge()
            turn = (turn + 1) % 4
            if turn == 0 and self._serve_app is not None and await self._orphaned():
                logger.warning("Serve application %s is gone; stopping", self._serve_app)
                await self.stop()
                ray.kill(ray.get_runtime_context().current_actor)

    async def _check(self, member: Member) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await member.handle.ping.remote()
            member.detail = ""
        except TimeoutError:
            member.detail = f"no answer for {ANSWER_S:g} s"
        except RayError as error:
            self._set(member, "failed", _words(error))
            self._bump()

    def _judge(self) -> None:
        gone = [member for member in self._members.values() if not member.alive]
        before = self._health
        if not gone:
            self._health, self._detail = "ready", ""
        elif any(m.role == "ffn" for m in gone) or not any(m.alive for m in self._of("attention")):
            names = ", ".join(member.name for member in gone)
            self._health, self._detail = "failed", f"gone: {names}; requests can't be served"
        else:
            names = ", ".join(member.name for member in gone)
            self._health, self._detail = "degraded", f"gone: {names}"
        if self._health != before:
            self._bump()

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

    async def members(self, version: int = -1, timeout_s: float = 0.0) -> dict[str, Any]:
        """The attention actors that take requests.

        Args:
            version: what the caller has; waits until there is something newer ...
            timeout_s: ... for at most this long.

        Returns:
            ``version``; ``attention``: name -> Ray handle; ``not_ready``: None, or why requests
            can't be served.
        """
        deadline = time.monotonic() + timeout_s
        while version >= self._version and (left := deadline - time.monotonic()) > 0:
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                break
        return self._members_now()

    def _members_now(self) -> dict[str, Any]:
        ready = {m.name: m.handle for m in self._of("attention") if m.state == "ready"}
        healthy = self._health in ("ready", "degraded")
        not_ready = None if healthy else self._detail or f"{self.spec.name} is {self._health}"
        return {"version": self._version, "attention": ready, "not_ready": not_ready}

    async def set_url(self, url: str) -> None:
        """Remember where the frontend listens, for ``status``."""
        self._url = url

    async def events(self, since: int = 0, timeout_s: float = 0.0) -> list[ActorEvent]:
        """Events with a number above ``since``; waits up to ``timeout_s`` for the first."""
        deadline = time.monotonic() + timeout_s
        while len(self._events) <= since and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return self._events[since:]

    async def spec_data(self) -> dict[str, Any]:
        """The spec that this manager serves, as JSON data."""
        return self.spec.model_dump(mode="json")

    async def status(self) -> ClusterStatus:
        """Everything about the deployment; asks the actors, each with a deadline."""
        await asyncio.gather(*(self._refresh(m) for m in self._members.values() if m.alive))
        return ClusterStatus(
            name=self.spec.name,
            url=self._url,
            health=self._health,
            epoch=self.table.epoch if self.table else None,
            lanes=self.spec.lanes,
            model=self.spec.served_name,
            actors=tuple(self._describe(member) for member in self._members.values()),
            detail=self._detail,
        )

    async def _refresh(self, member: Member) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                member.info = await member.handle.info.remote()
        except (TimeoutError, RayError) as error:
            member.detail = _words(error) or "no answer"

    def _describe(self, member: Member) -> ActorStatus:
        info = member.info or {}
        held = experts_of(self.table, member.name) if self.table else {}
        counts = {layer: len(experts) for layer, experts in held.items()}
        is_ffn = member.role == "ffn" and self.table is not None
        return ActorStatus(
            name=member.name,
            role=member.role,
            state=member.state,
            node=info.get("host"),
            node_ip=member.node_ip,
            pid=member.pid,
            placement_group=member.group.id.hex() if member.group else None,
            resources=self.spec.pool(member.role).resources.bundle(),
            experts=counts if is_ffn else None,
            expert_total=sum(counts.values()) if is_ffn else None,
            allocated_bytes=info.get("allocated_bytes", info.get("weight_bytes")),
            peers=tuple(info.get("peers", ())),
            detail=member.detail or info.get("last_error") or "",
        )

    # -- stop ------------------------------------------------------------------------------------

    async def stop(self) -> list[ActorStatus]:
        """End every actor and remove its place; returns what was running. Idempotent."""
        for task in (self._starting, self._watching):
            if task is not None and task is not asyncio.current_task() and not task.done():
                task.cancel()
                await asyncio.wait([task], timeout=STOP_S)
        running = [self._describe(m) for m in self._members.values() if m.handle is not None]
        await self._tear_down()
        self._health, self._detail = "stopped", ""
        self._bump()
        return running

    async def _tear_down(self) -> None:
        alive = [member for member in self._members.values() if member.handle is not None]
        calls = [member.handle.stop.remote() for member in alive if member.state != "failed"]
        if calls:  # a clean end closes connections and unlinks shared memory
            waits = [asyncio.ensure_future(_quietly(call)) for call in calls]
            await asyncio.wait(waits, timeout=STOP_S)
        for member in alive:
            ray_actors.kill(member.handle)
            member.handle = None
            if member.state != "failed":
                self._set(member, "stopped")
        await asyncio.to_thread(ray_actors.remove_groups, self.spec.name)
        for member in self._members.values():
            member.group = None

    # -- small things ----------------------------------------------------------------------------

    def _of(self, role: Role) -> list[Member]:
        return [member for member in self._members.values() if member.role == role]

    def _names(self, role: Role) -> list[str]:
        return [member.name for member in self._of(role)]

    def _set(self, member: Member, state: State, detail: str = "") -> None:
        if (member.state, member.detail) == (state, detail) and state != "pending":
            return
        member.state, member.detail = state, detail
        self._note(member, state, detail)

    def _note(self, member: Member | None, state: State, detail: str) -> None:
        self._events.append(
            ActorEvent(
                actor=member.name if member else "",
                role=member.role if member else None,
                state=state,
                detail=detail,
                seconds=time.monotonic() - self._began,
                number=len(self._events) + 1,
            )
        )

    def _bump(self) -> None:
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()


def connect_manager(spec: ClusterSpec) -> Any:
    """The Ray handle of the deployment's manager, which is created if there is none."""
    options = {
        "name": manager_name(spec.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
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
    """The Ray handle of an attention or FFN actor by its short name, or None."""
    try:
        return ray.get_actor(actor_name(deployment, member), namespace=NAMESPACE)
    except ValueError:
        return None


async def _all(work: Any) -> None:
    """Run together; the first error calls the others off and is raised."""
    tasks = [asyncio.ensure_future(job) for job in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _quietly(call: Awaitable[Any]) -> None:
    with suppress(RayError):
        await call


def _words(error: BaseException) -> str:
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
