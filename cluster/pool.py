"""vLLM's engine client over many attention actors: every HTTP request meets its actor here.

``AttentionPool`` is what vLLM's ``AsyncLLM`` talks to instead of an engine process. A request goes
to one actor by one Ray call; outputs come back over one stream per actor, a message per engine
step. A request whose actor is lost, drained or out of reach of its experts is started again at
another one from the prompt and the tokens emitted so far; when there is none, it waits. Not for
tokenising, HTTP, or deciding who is a member.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ray.exceptions import ActorDiedError, RayError, RayTaskError, TaskCancelledError
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.tasks import SupportedTask
from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import SchedulerStats

from cluster import arrivals, disconnects
from cluster.flights import (
    MAX_REPLAYS,
    Flight,
    Member,
    NoAttentionActor,
    RequestLost,
    fault_of,
)
from cluster.request_metrics import InFlight, Journey, Outcome, RequestMetrics
from cluster.routing import Load, Router

if TYPE_CHECKING:
    from cluster.tracing import FrontDoorTraces

__all__ = ["AttentionPool", "Flight", "NoAttentionActor", "RequestLost", "engine_client"]

logger = logging.getLogger(__name__)

UTILITY_TIMEOUT_S = 60.0
RETRY_S = 0.25
"""The first pause before a request goes back to where it failed; it doubles from time to time."""

SIGN_S = 15.0
"""Pause between signs of life; an actor takes a client for gone after four of them."""

_OUTCOMES: dict[FinishReason, Outcome] = {
    FinishReason.STOP: "stop",
    FinishReason.REPETITION: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
}

OnFailure = Callable[[list[str], Exception], None]


class _Resources:
    """The flag that ``AsyncLLM`` looks at; a pool without actors is not dead, it waits for some."""

    engine_dead = False


class AttentionPool(EngineCoreClient):
    """Spreads requests over the live attention actors.

    Must be made inside a running event loop, and is used by that loop only.

    Args:
        client_index: tells this pool's outputs from other pools' at the actors; unique per pool.
        capacity: the most members at one time (labels in vLLM's metrics).
        router: chooses the actor of a request.
        wait_s: seconds that a request waits for an actor that can take it.
        on_failure: called with the ids of requests that end in an error and the reason, before
            their final output with finish reason ``error`` appears.
        metrics: told what happens to requests; None measures nothing.
        traces: makes a span of every stay of a request at an actor; None traces nothing.
    """

    def __init__(
        self,
        client_index: int,
        *,
        capacity: int = 16,
        router: Router | None = None,
        wait_s: float = 60.0,
        on_failure: OnFailure | None = None,
        metrics: RequestMetrics | None = None,
        traces: FrontDoorTraces | None = None,
    ):
        self.client_index = client_index
        self.engine_ranks_managed = list(range(capacity))
        self.resources = _Resources()
        self.wait_s = wait_s
        self.on_failure = on_failure
        self.replays = 0
        self._router = router or Router()
        self._members: dict[str, Member] = {}
        self._flights: dict[str, Flight] = {}
        self._dead: dict[str, Any] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._reader: asyncio.Task[Any] | None = None
        self._traces = traces
        self._metrics = metrics
        if metrics is not None:
            metrics.follow(self.in_flight)

    # -- members ---------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the live actors, draining ones included."""
        return tuple(sorted(self._members))

    @property
    def open(self) -> bool:
        """True while an actor takes new requests; without one they wait."""
        return any(member.open for member in self._members.values())

    @property
    def flights(self) -> Mapping[str, Flight]:
        """Requests in flight by id, in the order of arrival."""
        return self._flights

    def loads(self) -> dict[str, Load]:
        """Load of every live actor as this pool knows it."""
        return {name: member.load for name, member in self._members.items()}

    def in_flight(self) -> InFlight:
        """What is in flight; safe from any thread."""
        running = sum(len(member.flights) for member in list(self._members.values()))
        return InFlight(running, max(0, len(self._flights) - running), self.replays)

    def set_actors(self, actors: Mapping[str, Any], draining: Collection[str] = ()) -> None:
        """Make ``actors`` (name -> Ray handle) the members.

        New names join, missing ones leave, and a name with another handle is replaced. Requests at
        an actor that leaves go on at another one. Actors named in ``draining`` finish what they
        have and get no new requests.

        Raises:
            ValueError: more actors than the pool has labels for; those that fit have joined.
        """
        for name, member in [*self._members.items()]:
            if name not in actors or not _same_actor(actors[name], member.handle):
                self._drop(member, f"attention actor {name} has left", fault=False)
        self._dead = {
            name: handle
            for name, handle in self._dead.items()
            if name in actors and _same_actor(actors[name], handle)
        }
        for name, handle in actors.items():
            if name not in self._members and name not in self._dead:
                self._join(name, handle)
        for name, member in self._members.items():
            member.draining = name in draining
        self._dispatch()
        left_out = sorted(actors.keys() - self._members.keys() - self._dead.keys())
        if left_out:
            limit = len(self.engine_ranks_managed)
            raise ValueError(f"{left_out} do not fit: the pool takes {limit} actors at most")

    def _join(self, name: str, handle: Any) -> None:
        used = {member.engine_index for member in self._members.values()}
        free = next((i for i in self.engine_ranks_managed if i not in used), None)
        if free is None:
            return
        member = self._members[name] = Member(name, handle, free)
        method = handle.outputs.options(num_returns="streaming")
        member.pump = self._spawn(self._pump(member, _call(method, self.client_index)))
        self._spawn(self._give_signs(member))

    def _drop(self, member: Member, reason: str, *, fault: bool = True) -> None:
        """Remove a member; its requests go on elsewhere."""
        if self._members.get(member.name) is not member:
            return
        del self._members[member.name]
        self._router.forget(member.name)
        if member.pump is not None and member.pump is not asyncio.current_task():
            member.pump.cancel()
        moved, member.flights = list(member.flights.values()), {}
        logger.warning("%s; %d requests go on elsewhere", reason, len(moved))
        if moved:  # it may be alive: what it still computes would be nobody's
            self._abort(member, [flight.id for flight in moved])
        # vLLM's gauges keep what they were told last
        self._outputs.put_nowait(
            EngineCoreOutputs(engine_index=member.engine_index, scheduler_stats=SchedulerStats())
        )
        for flight in moved:
            self._again(flight, reason, fault=fault)
        self._dispatch()

    async def _pump(self, member: Member, stream: AsyncIterator[Any]) -> None:
        """Carry one actor's outputs into the common queue until the actor is gone."""
        try:
            async for ref in stream:
                outputs = await ref
                if outputs is None:
                    member.listening = True
                    self._dispatch()
                else:
                    self._accept(member, outputs)
            reason = f"attention actor {member.name} is gone (stopped)"
        except RayError as error:
            reason = self._note_death(member, error)
        self._drop(member, reason)

    async def _give_signs(self, member: Member) -> None:
        """Tell an actor now and then that somebody reads its stream."""
        while True:
            await asyncio.sleep(SIGN_S)
            if self._members.get(member.name) is not member:
                return
            await _ignore_errors(_call(member.handle.listening, self.client_index))

    def _note_death(self, member: Member, error: RayError) -> str:
        """Remember an actor that will not come back, so that a stale list doesn't bring it back."""
        if isinstance(error, ActorDiedError):
            self._dead[member.name] = member.handle
        return f"attention actor {member.name} is gone ({_first_line(error)})"

    # -- requests --------------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to an actor, or let it wait for one.

        Doesn't wait itself: a request that can't be brought to its end gets a final output with
        finish reason ``error``.

        Raises:
            RequestLost: a part of a streaming-input session whose actor is gone.
        """
        disconnects.note(request.request_id)
        request.client_index = self.client_index
        flight = self._flights.get(request.request_id)
        if flight is not None:
            # A streaming-input session sends its later parts under the same id to the same actor.
            member = self._members.get(flight.actor or "")
            if member is None:
                raise RequestLost("the actor of this session is gone; start a new session")
            flight.request = request
            flight.journey = self._begin(request)
            self._post(member, flight)
            return
        flight = Flight(request, session=request.resumable, journey=self._begin(request))
        if self._traces is not None:
            flight.trail = self._traces.begin(flight.id)
        self._flights[flight.id] = flight
        self._dispatch([flight])

    def _begin(self, request: EngineCoreRequest) -> Journey | None:
        if self._metrics is None:
            return None
        return self._metrics.arrived(len(request.prompt_token_ids or ()), arrivals.current())

    def _dispatch(self, flights: Collection[Flight] | None = None) -> None:
        """Send what waits, in the order of arrival, as far as there are actors for it."""
        now = self._loop.time()
        for flight in [*(self._flights.values() if flights is None else flights)]:
            if flight.actor is not None or self._flights.get(flight.id) is not flight:
                continue
            if flight.not_before > now:
                continue
            member = self._choose(flight)
            if member is not None:
                member.flights[flight.id] = flight
                flight.actor = member.name
                if flight.trail is not None:
                    flight.trail.arrive(member.name, len(flight.emitted))
                self._post(member, flight)
            elif flight.session:
                self._fail([flight], NoAttentionActor("no attention actor takes a session now"))
            elif flight.deadline is None:
                flight.deadline = self._loop.call_later(self.wait_s, self._expire, flight)

    def _choose(self, flight: Flight) -> Member | None:
        """The member for a flight, or None when there is none that takes requests."""
        loads = {name: member.load for name, member in self._members.items() if member.open}
        if len(loads) > 1 and flight.avoid is not None:
            loads.pop(flight.avoid, None)
        request = flight.request
        salt = request.cache_salt or ""
        if request.lora_request is not None:
            salt += f"/lora={request.lora_request.lora_int_id}"
        choice = self._router.choose(flight.tokens, loads, salt=salt)
        if choice is None:
            return None
        flight.prefill_tokens = max(0, len(flight.tokens) - choice.cached_tokens)
        return self._members[choice.actor]

    def _post(self, member: Member, flight: Flight) -> None:
        if flight.trail is not None:
            flight.request.trace_headers = flight.trail.headers
        call = _call(member.handle.add_request, flight.request, tuple(flight.emitted))
        self._spawn(self._confirm(member, flight, call))

    async def _confirm(self, member: Member, flight: Flight, call: Awaitable[Any]) -> None:
        """See what became of a request that was sent to an actor."""
        try:
            await call
        except RayTaskError as error:
            if member.flights.get(flight.id) is not flight:
                return
            cause = error.cause if isinstance(error.cause, Exception) else error
            if getattr(cause, "code", None) == "not_running":
                self._again(flight, f"{member.name}: {_first_line(cause)}", at=member, fault=False)
            elif isinstance(cause, (VLLMClientError, GracefulHTTPError)):
                self._fail([flight], cause)
            else:
                self._fail([flight], RequestLost(f"{member.name} refused: {_first_line(cause)}"))
        except TaskCancelledError:
            if member.flights.get(flight.id) is flight:
                self._again(flight, f"{member.name}: the call was cancelled", at=member)
        except RayError as error:
            self._drop(member, self._note_death(member, error))
        else:
            if member.flights.get(flight.id) is flight:
                flight.settle()
            else:  # aborted or moved meanwhile; its abort may have overtaken it
                self._abort(member, [flight.id])

    def _again(
        self, flight: Flight, reason: str, *, at: Member | None = None, fault: bool = True
    ) -> None:
        """Take a flight back from its actor, to be sent again from the tokens emitted so far.

        Args:
            at: the actor where it failed, when that actor still lives.
            fault: counts against the request; a drained actor, for one, doesn't.
        """
        if at is not None:
            at.flights.pop(flight.id, None)
            flight.avoid = at.name
        flight.actor = None
        flight.faults += fault
        if flight.trail is not None:
            flight.trail.leave("lost" if fault else "moved", len(flight.emitted), reason)
        if flight.session:
            self._fail([flight], RequestLost(f"{reason}; start a new session"))
        elif flight.faults > MAX_REPLAYS:
            message = f"{reason}; given up after {MAX_REPLAYS} replays, send the request again"
            self._fail([flight], RequestLost(message))
        elif flight.complete:
            self._finish([flight], FinishReason.LENGTH)
        else:
            self.replays += 1
            if flight.journey is not None:
                flight.journey.replays += 1
            if flight.deadline is None:
                flight.deadline = self._loop.call_later(self.wait_s, self._expire, flight)
            if at is not None:
                self._retry(flight, at)

    def _retry(self, flight: Flight, at: Member) -> None:
        """Send a flight on from an actor that lives: elsewhere at once, else after a pause."""
        others = (member for member in self._members.values() if member is not at)
        if flight.refusals == 0 and any(member.open for member in others):
            self._dispatch([flight])
        else:
            pause = RETRY_S * 2 ** min(flight.refusals, 4)
            flight.not_before = self._loop.time() + pause
            self._loop.call_later(pause, self._resume, flight)
        flight.refusals += 1

    def _resume(self, flight: Flight) -> None:
        flight.not_before = 0.0
        self._dispatch([flight])

    def _expire(self, flight: Flight) -> None:
        flight.deadline = None
        if self._flights.get(flight.id) is flight and flight.actor is None:
            message = f"no attention actor could take the request within {self.wait_s:g} s"
            self._fail([flight], NoAttentionActor(f"{message}; try again later"))

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Tell the actors to forget requests; ids that aren't in flight are ignored.

        The reader of outputs asks this for requests that have met a stop string: they have ended
        well. Whoever else asks calls them off.
        """
        own = self._reader is not None and asyncio.current_task() is self._reader
        by_member: dict[str, list[str]] = {}
        for request_id in request_ids:
            flight = self._flights.get(request_id)
            if flight is None:
                continue
            self._forget(flight, "stop" if own else "abort")
            if flight.actor is not None:
                by_member.setdefault(flight.actor, []).append(request_id)
        for name, ids in by_member.items():
            if name in self._members:
                self._abort(self._members[name], ids)

    def _abort(self, member: Member, request_ids: list[str]) -> None:
        self._spawn(_ignore_errors(_call(member.handle.abort, request_ids)))

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of one engine step of one actor."""
        self._reader = asyncio.current_task()
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    def _accept(self, member: Member, outputs: EngineCoreOutputs) -> None:
        known: list[EngineCoreOutput] = []
        member.label(outputs)
        now = time.monotonic()
        for output in outputs.outputs:
            flight = member.flights.get(output.request_id)
            if flight is None:
                continue  # aborted meanwhile, or started again elsewhere
            if fault_of(output) is not None:
                self._again(flight, f"{member.name}: {output.stop_reason}", at=member)
                continue
            flight.emitted.extend(output.new_token_ids)
            flight.prefill_tokens = flight.refusals = 0
            self._measure(flight, output, now)
            if output.finish_reason == FinishReason.ERROR and self.on_failure is not None:
                reason = output.stop_reason or "the step failed"
                self.on_failure([output.request_id], RequestLost(f"{member.name}: {reason}"))
            if output.finish_reason is not None:
                self._forget(flight, _OUTCOMES[output.finish_reason])
            if flight.trail is not None:
                output.trace_headers = flight.trail.door
            known.append(output)
        outputs.outputs = known
        self._outputs.put_nowait(outputs)

    def _measure(self, flight: Flight, output: EngineCoreOutput, now: float) -> None:
        metrics, journey = self._metrics, flight.journey
        if metrics is None or journey is None:
            return
        if journey.scheduled is None:
            for event in output.events or ():
                if event.type == EngineCoreEventType.SCHEDULED:
                    metrics.scheduled(journey, event.timestamp)
                    break
        if output.prefill_stats is not None and journey.first is None:
            journey.cached = output.prefill_stats.num_cached_tokens
        if output.new_token_ids:
            metrics.tokens(journey, len(output.new_token_ids), now)

    def _fail(self, flights: Collection[Flight], reason: Exception) -> None:
        """End flights with an error."""
        if self._metrics is not None and isinstance(reason, NoAttentionActor):
            for _ in flights:
                self._metrics.rejected("no_actor")
        for flight in flights:
            if flight.trail is not None:
                flight.trail.leave("error", len(flight.emitted), str(reason))
        if self.on_failure is not None:
            self.on_failure([flight.id for flight in flights], reason)
        self._finish(flights, FinishReason.ERROR, str(reason))

    def _finish(
        self, flights: Collection[Flight], end: FinishReason, text: str | None = None
    ) -> None:
        final = []
        for flight in flights:
            self._forget(flight, _OUTCOMES[end])
            output = EngineCoreOutput(flight.id, [], finish_reason=end, stop_reason=text)
            if flight.trail is not None:
                output.trace_headers = flight.trail.door
            final.append(output)
        finished = {output.request_id for output in final}
        self._outputs.put_nowait(EngineCoreOutputs(outputs=final, finished_requests=finished))

    def _forget(self, flight: Flight, outcome: Outcome) -> None:
        if self._metrics is not None and flight.journey is not None:
            self._metrics.finished(flight.journey, outcome)
        if flight.trail is not None:
            flight.trail.leave(outcome, len(flight.emitted))
        flight.settle()
        self._flights.pop(flight.id, None)
        if flight.actor in self._members:
            self._members[flight.actor].flights.pop(flight.id, None)

    # -- utilities: asked of every actor ---------------------------------------------------------

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        """Call an engine utility at every actor; one result each.

        Raises:
            NoAttentionActor: there is none.
            TimeoutError: an actor took longer than ``UTILITY_TIMEOUT_S``.
            AffluxError: the actors don't offer it.
        """
        members = list(self._members.values())
        if not members:
            raise NoAttentionActor(f"no attention actor is alive to run {method}")
        calls = [_result(_call(member.handle.utility, method, *args)) for member in members]
        return await asyncio.wait_for(asyncio.gather(*calls), UTILITY_TIMEOUT_S)

    async def get_supported_tasks_async(self) -> tuple[SupportedTask, ...]:
        """What the model can do; the same at every actor."""
        return tuple((await self.call_utility_all_async("get_supported_tasks"))[0])

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Empty the prefix cache of every actor; False when one could not."""
        for name in self._members:
            self._router.forget(name)
        return all(
            await self.call_utility_all_async(
                "reset_prefix_cache", reset_running_requests, reset_connector
            )
        )

    async def reset_mm_cache_async(self) -> None:
        """Empty the multi-modal cache of every actor."""
        await self.call_utility_all_async("reset_mm_cache")

    async def reset_encoder_cache_async(self) -> None:
        """Empty the encoder cache of every actor."""
        await self.call_utility_all_async("reset_encoder_cache")

    async def add_lora_async(self, lora_request: Any) -> bool:
        """Load a LoRA adapter at every actor."""
        return all(await self.call_utility_all_async("add_lora", lora_request))

    async def remove_lora_async(self, lora_id: int) -> bool:
        """Remove a LoRA adapter from every actor."""
        return all(await self.call_utility_all_async("remove_lora", lora_id))

    async def list_loras_async(self) -> set[int]:
        """Adapters that every actor has."""
        return set.intersection(*map(set, await self.call_utility_all_async("list_loras")))

    async def pin_lora_async(self, lora_id: int) -> bool:
        """Keep an adapter loaded at every actor."""
        return all(await self.call_utility_all_async("pin_lora", lora_id))

    async def is_sleeping_async(self) -> bool:
        """Actors can't be put to sleep, so never."""
        return False

    async def is_scheduler_paused_async(self) -> bool:
        """True when every actor's scheduler is paused."""
        return all(await self.call_utility_all_async("is_scheduler_paused"))

    async def get_weight_version_async(self) -> str:
        """Weights don't change while serving."""
        return "default"

    def dp_engines_running(self) -> bool:
        """True while a request is in flight."""
        return bool(self._flights)

    # -- not offered: each would change one side of a model that lives in two places --------------

    async def profile_async(self, *args: Any, **kwargs: Any) -> None:
        """Not offered."""
        raise _not_offered("profiling")

    async def sleep_async(self, *args: Any, **kwargs: Any) -> None:
        """Not offered."""
        raise _not_offered("sleep")

    async def wake_up_async(self, *args: Any, **kwargs: Any) -> bool:
        """Not offered."""
        raise _not_offered("wake-up")

    async def release_kv_cache_memory_async(self) -> None:
        """Not offered."""
        raise _not_offered("releasing the KV cache")

    async def pause_scheduler_async(self, *args: Any, **kwargs: Any) -> None:
        """Not offered."""
        raise _not_offered("pausing generation")

    async def resume_scheduler_async(self) -> None:
        """Not offered."""
        raise _not_offered("resuming generation")

    async def set_weight_version_async(self, weight_version: str) -> None:
        """Not offered."""
        raise _not_offered("changing weights")

    async def collective_rpc_async(self, method: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Not offered."""
        raise _not_offered(f"collective_rpc({method!r})")

    async def compute_weight_checksums_async(self) -> list[dict[str, str]]:
        """Not offered."""
        raise _not_offered("weight checksums")

    async def save_sharded_state_async(self, *args: Any, **kwargs: Any) -> None:
        """Not offered."""
        raise _not_offered("saving sharded state")

    async def execute_dummy_batch_async(self) -> None:
        """Not offered."""
        raise _not_offered("a dummy batch")

    async def prepare_elastic_ep(self, new_data_parallel_size: int) -> None:
        """Not offered."""
        raise _not_offered("elastic expert parallelism of vLLM; change ffn.count instead")

    async def commit_elastic_ep(self) -> None:
        """Not offered."""
        raise _not_offered("elastic expert parallelism of vLLM; change ffn.count instead")

    async def handle_fault(self, fault_tolerance_request: Any) -> Any:
        """Not offered."""
        raise _not_offered("fault handling of vLLM")

    async def get_status(self) -> Any:
        """Not offered."""
        raise _not_offered("engine status of vLLM; see afflux status")

    # -- end -------------------------------------------------------------------------------------

    def shutdown(self, timeout: float | None = None) -> None:
        """Abort what is in flight and stop listening; safe from any thread and more than once."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._shutdown)

    def _shutdown(self) -> None:
        for member in self._members.values():
            if member.flights:
                _call(member.handle.abort, list(member.flights))
        for flight in self._flights.values():
            flight.settle()
            if flight.trail is not None:
                flight.trail.leave("abort", len(flight.emitted), "the frontend has ended")
        self._members.clear()
        self._flights.clear()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        # Without the context of whoever asks: see ``_call``.
        task: asyncio.Task[Any] = self._loop.create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # Ours to fix, not the user's: end the output handler, so that nobody waits for ever.
            logger.error("a task of the attention pool failed", exc_info=task.exception())
            error = task.exception()
            self._outputs.put_nowait(error if isinstance(error, Exception) else RuntimeError())


@contextmanager
def engine_client(pool: EngineCoreClient) -> Iterator[None]:
    """Inside, an ``AsyncLLM`` that is being made takes ``pool`` as its engine client.

    vLLM has no parameter for it: ``AsyncLLM.__init__`` asks this one factory. The factory is put
    back on exit, so nothing else in the process sees the change.
    """
    original = EngineCoreClient.__dict__["make_async_mp_client"]
    replacement: Any = staticmethod(lambda *args, **kwargs: pool)
    EngineCoreClient.make_async_mp_client = replacement
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original  # type: ignore[method-assign]


def _call(method: Any, *args: Any) -> Any:
    """Call a Ray method as nobody's child.

    Ray Serve cancels the task of an HTTP request whose client has gone, and Ray cancels with a task
    all calls that were made in its context: among them the very abort that should end the request
    at its actor.
    """
    return contextvars.Context().run(method.remote, *args)


def _not_offered(what: str) -> NotImplementedError:
    return NotImplementedError(f"{what} is not offered by afflux")


def _same_actor(one: Any, other: Any) -> bool:
    if one is other:
        return True
    ids = [getattr(handle, "_actor_id", None) for handle in (one, other)]
    return ids[0] is not None and ids[0] == ids[1]


async def _result(call: Awaitable[Any]) -> Any:
    """Await a Ray call; an error of the actor's code is raised as itself."""
    try:
        return await call
    except RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise


async def _ignore_errors(call: Awaitable[Any]) -> None:
    with suppress(RayError):  # the actor is gone, and with it the request
        await call


def _first_line(error: BaseException) -> str:
    if isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
