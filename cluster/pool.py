"""vLLM's engine client over many attention actors: every HTTP request meets its actor here.

``AttentionPool`` is what vLLM's ``AsyncLLM`` talks to instead of an engine process. A request goes
to one actor by one Ray call; outputs come back over one stream per actor, a message per engine
step. The pool knows the prompt, the parameters and the emitted tokens of every request in flight,
so that a request can be started again elsewhere. Not for tokenising, HTTP, or deciding who is a
member.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from ray.exceptions import RayError, RayTaskError
from vllm.exceptions import GracefulHTTPError, VLLMClientError
from vllm.tasks import SupportedTask
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.core_client import EngineCoreClient

from cluster.routing import Load, Router

logger = logging.getLogger(__name__)

UTILITY_TIMEOUT_S = 60.0
OnFailure = Callable[[list[str], Exception], None]


class RequestLost(GracefulHTTPError):
    """A request that ended because its actor died or its step failed; safe to send again (503)."""

    def __init__(self, message: str):
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class NoAttentionActor(RequestLost):
    """No attention actor is alive to take the request (503)."""


@dataclass(slots=True)
class Flight:
    """A request in flight: all that is needed to start it again from where it is."""

    request: EngineCoreRequest
    actor: str
    cached_tokens: int = 0
    emitted: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> list[int]:
        """Prompt token ids; empty when the prompt came as embeddings."""
        return self.request.prompt_token_ids or []

    @property
    def prefill_tokens(self) -> int:
        """Prompt tokens that the actor probably has still to compute."""
        return 0 if self.emitted else max(0, len(self.prompt) - self.cached_tokens)


@dataclass(slots=True)
class Member:
    """An attention actor in the pool; ``engine_index`` is its label in vLLM's metrics."""

    name: str
    handle: Any
    engine_index: int
    pump: asyncio.Task[None] | None = None
    flights: dict[str, Flight] = field(default_factory=dict)

    @property
    def load(self) -> Load:
        """What waits at this actor, as this pool knows it."""
        prefill = sum(flight.prefill_tokens for flight in self.flights.values())
        return Load(len(self.flights), prefill)


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
        on_failure: called with the ids of requests that end in an error and the reason, before
            their final output with finish reason ``error`` appears.
    """

    def __init__(
        self,
        client_index: int,
        *,
        capacity: int = 16,
        router: Router | None = None,
        on_failure: OnFailure | None = None,
    ):
        self.client_index = client_index
        self.engine_ranks_managed = list(range(capacity))
        self.resources = _Resources()
        self.on_failure = on_failure
        self._router = router or Router()
        self._members: dict[str, Member] = {}
        self._flights: dict[str, Flight] = {}
        self._outputs: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()

    # -- members ---------------------------------------------------------------------------------

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the live actors."""
        return tuple(sorted(self._members))

    @property
    def flights(self) -> Mapping[str, Flight]:
        """Requests in flight by id."""
        return self._flights

    def loads(self) -> dict[str, Load]:
        """Load of every live actor as this pool knows it."""
        return {name: member.load for name, member in self._members.items()}

    def set_actors(self, actors: Mapping[str, Any]) -> None:
        """Make ``actors`` (name -> Ray handle) the members.

        New names join, missing ones leave, and a name with another handle is replaced. Requests at
        an actor that leaves end with ``RequestLost``.
        """
        for name in [*self._members]:
            if name not in actors or not _same_actor(actors[name], self._members[name].handle):
                self._drop(self._members[name], f"attention actor {name} is gone")
        for name, handle in actors.items():
            if name not in self._members:
                self._join(name, handle)

    def _join(self, name: str, handle: Any) -> None:
        used = {member.engine_index for member in self._members.values()}
        free = next((i for i in self.engine_ranks_managed if i not in used), None)
        if free is None:
            raise ValueError(f"{name} does not fit: the pool takes {len(used)} actors at most")
        member = self._members[name] = Member(name, handle, free)
        # Listen first: outputs that an actor makes before it has a listener may be dropped there.
        stream = handle.outputs.options(num_returns="streaming").remote(self.client_index)
        member.pump = self._spawn(self._pump(member, stream))

    def _drop(self, member: Member, reason: str) -> None:
        """Remove a member and end its requests."""
        if self._members.get(member.name) is not member:
            return
        del self._members[member.name]
        self._router.forget(member.name)
        if member.pump is not None and member.pump is not asyncio.current_task():
            member.pump.cancel()
        lost = list(member.flights)
        logger.warning("%s; %d requests end", reason, len(lost))
        self._fail(lost, RequestLost(f"{reason}; send the request again"))

    async def _pump(self, member: Member, stream: AsyncIterator[Any]) -> None:
        """Carry one actor's outputs into the common queue until the actor is gone."""
        try:
            async for ref in stream:
                self._accept(member, await ref)
            reason = f"attention actor {member.name} is gone (stopped)"
        except RayError as error:
            reason = f"attention actor {member.name} is gone ({_first_line(error)})"
        self._drop(member, reason)

    # -- requests --------------------------------------------------------------------------------

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Send a request to an actor. Raises ``NoAttentionActor`` when there is none.

        Doesn't wait for the actor: an error there ends the request like a lost actor does.
        """
        # A streaming-input session sends its later parts under the same id to the same actor.
        previous = self._flights.get(request.request_id)
        if previous is not None:
            member, cached = self._members[previous.actor], 0
        else:
            member, cached = self._choose(request)
        request.client_index = self.client_index
        flight = Flight(request, member.name, cached)
        if previous is not None:
            flight.emitted = previous.emitted
        self._flights[request.request_id] = member.flights[request.request_id] = flight
        call = member.handle.add_request.remote(request)
        self._spawn(self._confirm(member, request.request_id, call))

    def _choose(self, request: EngineCoreRequest) -> tuple[Member, int]:
        salt = request.cache_salt or ""
        if request.lora_request is not None:
            salt += f"/lora={request.lora_request.lora_int_id}"
        choice = self._router.choose(request.prompt_token_ids or [], self.loads(), salt=salt)
        if choice is None:
            raise NoAttentionActor("no attention actor is alive; try again later")
        return self._members[choice.actor], choice.cached_tokens

    async def _confirm(self, member: Member, request_id: str, call: Awaitable[Any]) -> None:
        """See to it that a request which the actor refuses ends with the actor's reason."""
        try:
            await call
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            known = isinstance(cause, (VLLMClientError, GracefulHTTPError))
            reason = cause if known else RequestLost(f"{member.name} refused: {_first_line(cause)}")
            self._fail([request_id], reason)
        except RayError as error:
            self._drop(member, f"attention actor {member.name} is gone ({_first_line(error)})")

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Tell the actors to forget requests; ids that aren't in flight are ignored."""
        by_member: dict[str, list[str]] = {}
        for request_id in request_ids:
            flight = self._forget(request_id)
            if flight is not None:
                by_member.setdefault(flight.actor, []).append(request_id)
        for name, ids in by_member.items():
            if name in self._members:
                self._spawn(_ignore_errors(self._members[name].handle.abort.remote(ids)))

    async def get_output_async(self) -> EngineCoreOutputs:
        """The outputs of one engine step of one actor."""
        outputs = await self._outputs.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    def _accept(self, member: Member, outputs: EngineCoreOutputs) -> None:
        known: list[EngineCoreOutput] = []
        for output in outputs.outputs:
            flight = member.flights.get(output.request_id)
            if flight is None:
                continue  # aborted meanwhile, or started again elsewhere
            flight.emitted.extend(output.new_token_ids)
            if output.finish_reason == FinishReason.ERROR and self.on_failure is not None:
                reason = output.stop_reason or "the step failed"
                self.on_failure([output.request_id], RequestLost(f"{member.name}: {reason}"))
            if output.finished:
                self._forget(output.request_id)
            known.append(output)
        outputs.outputs = known
        outputs.engine_index = member.engine_index
        self._outputs.put_nowait(outputs)

    def _fail(self, request_ids: list[str], reason: Exception) -> None:
        lost = [request_id for request_id in request_ids if self._forget(request_id)]
        if not lost:
            return
        if self.on_failure is not None:
            self.on_failure(lost, reason)
        final = [
            EngineCoreOutput(id_, [], finish_reason=FinishReason.ERROR, stop_reason=str(reason))
            for id_ in lost
        ]
        self._outputs.put_nowait(EngineCoreOutputs(outputs=final, finished_requests=set(lost)))

    def _forget(self, request_id: str) -> Flight | None:
        flight = self._flights.pop(request_id, None)
        if flight is not None and flight.actor in self._members:
            self._members[flight.actor].flights.pop(request_id, None)
        return flight

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
        calls = [_result(member.handle.utility.remote(method, *args)) for member in members]
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
                member.handle.abort.remote(list(member.flights))
        self._members.clear()
        self._flights.clear()
        for task in self._tasks:
            task.cancel()

    def _spawn(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = self._loop.create_task(work)
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
