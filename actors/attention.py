"""The attention actor: an ``AttentionEngine`` on a thread, behind asynchronous methods.

``cluster`` turns the class into a Ray actor; nothing here imports Ray, so it runs in a plain
process too. The engine lives on one thread; the event loop only passes messages. Changes of peers
and table do not need that thread, so they go on while a step waits for a table. Outputs leave as
one message per engine step and client, not one per token.
"""

import asyncio
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from actors import replay
from actors.engine import AttentionConfig, AttentionEngine
from actors.errors import AffluxError
from actors.metrics.attention import AttentionMetrics
from actors.nearness import Nearness
from actors.outboxes import Outboxes
from actors.table import ExpertTable
from actors.telemetry import no_telemetry
from actors.transport.endpoint import Offer

if TYPE_CHECKING:
    from actors.request_spans import RequestSpans

logger = logging.getLogger(__name__)

UTILITIES = frozenset(
    {
        "get_supported_tasks",
        "reset_prefix_cache",
        "reset_mm_cache",
        "reset_encoder_cache",
        "add_lora",
        "remove_lora",
        "list_loras",
        "pin_lora",
        "is_sleeping",
        "is_scheduler_paused",
    }
)


class AttentionActor:
    """Serves requests on one attention engine. All methods are safe to call at any time.

    States: ``created`` -> ``importing`` -> ``loading`` -> ``loaded`` -> ``ready`` (a table is in
    use) -> ``stopped``; ``failed`` when the engine could not be built or its loop died.
    """

    def __init__(self) -> None:
        self.state = "created"
        self.error: str | None = None
        self._engine: AttentionEngine | None = None
        self._thread: threading.Thread | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outboxes = Outboxes()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._note: dict[str, Any] | None = None
        self._news = asyncio.Event()
        self._nearness = Nearness()
        self._metrics: AttentionMetrics | None = None
        self._spans: RequestSpans | None = None

    # -- life cycle ------------------------------------------------------------------------------

    async def start(self, config: AttentionConfig) -> dict[str, Any]:
        """Build the engine; returns ``info()``. A second call with the same config returns at once.

        Raises:
            AffluxError: the model or the arguments are refused (see ``AttentionEngine``), or the
            actor
                was already started with another config.
        """
        if self._thread is None:
            self._loop = asyncio.get_running_loop()
            if config.metrics is not None:
                self._metrics = AttentionMetrics(config.metrics, config.name)
            self.config = config
            self._started: Future[None] = Future()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        elif config != self.config:
            raise AffluxError(
                f"{self.config.name} was already started with another configuration",
                code="already_started",
            )
        await asyncio.wrap_future(self._started)
        return await self.info()

    def _run(self) -> None:
        try:
            self.state = "importing"
            import vllm.v1.engine.core  # noqa: F401  the slow import, visible as a state of its own

            self.state = "loading"
            if self.config.threads is not None:
                torch.set_num_threads(self.config.threads)  # of this thread and no other
            self._engine = AttentionEngine(self.config)
            self._engine.client.on_fault(lambda fault: self._call_on_loop(self._ring))
            if self._metrics is not None:
                self._metrics.watch(self._engine)
            if self.config.tracing is not None:
                self._engine.spans = self._spans = self._make_spans(self._engine)
            self.state = "loaded"
        except BaseException as error:
            self._fail(error)
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._serve(self._engine)
            self.state = "stopped"
        except BaseException as error:
            logger.exception("engine loop of %s died", self.config.name)
            self._fail(error)
        finally:
            self._refuse_inbox()
            self._engine.client.stop()
            self._engine.close()
            self._call_on_loop(self._outboxes.close)

    def _make_spans(self, engine: AttentionEngine) -> "RequestSpans":
        from actors.request_spans import RequestSpans  # OpenTelemetry, which others don't need
        from actors.tracing import Tracing

        assert self.config.tracing is not None
        tracing = Tracing(self.config.tracing, "afflux-attention", self.config.name)
        return RequestSpans(tracing, engine.client)

    def _fail(self, error: BaseException) -> None:
        self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        self._call_on_loop(self._ring)

    def _serve(self, engine: AttentionEngine) -> None:
        while not self._stopping.is_set():
            self._drain_inbox(block=not engine.has_work)
            if not engine.has_work:
                continue
            for client, outputs in engine.step().items():
                self._call_on_loop(self._send, engine, client, outputs)

    def _drain_inbox(self, block: bool) -> None:
        try:
            while True:
                self._inbox.get(block=block)()
                block = False
        except queue.Empty:
            return

    def _refuse_inbox(self) -> None:
        self._stopping.set()
        self._drain_inbox(block=False)

    def _send(self, engine: AttentionEngine, client: int, message: Any) -> None:
        if not self._outboxes.put(client, message):
            logger.warning("client %d is silent; its requests are aborted", client)
            self._inbox.put(lambda: engine.abort_client(client))

    def _call_on_loop(self, function: Callable[..., None], *args: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _running(self) -> AttentionEngine:
        engine = self._engine
        if engine is None or self._stopping.is_set() or self.state == "failed":
            raise AffluxError(
                f"attention actor is {self.state}" + (f": {self.error}" if self.error else ""),
                code="not_running",
            )
        return engine

    async def _on_engine(self, work: Callable[[AttentionEngine], Any]) -> Any:
        """Run ``work`` on the engine's thread, between steps, and return its result."""
        engine = self._running()
        result: Future[Any] = Future()

        def task() -> None:
            if not result.set_running_or_notify_cancel():
                return
            try:
                result.set_result(work(engine))
            except BaseException as error:
                result.set_exception(error)

        self._inbox.put(task)
        return await asyncio.wrap_future(result)

    async def stop(self) -> None:
        """End the engine loop after the step in progress; idempotent.

        A step that waits for an expert table does not finish: its requests end with an error.
        """
        self._stopping.set()
        if self._engine is not None:
            self._engine.client.stop()
        self._inbox.put(lambda: None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 30.0)
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            await asyncio.to_thread(metrics.close)
        spans, self._spans = self._spans, None
        if spans is not None:
            await asyncio.to_thread(spans.close)

    # -- peers and table: not on the engine's thread, which may be waiting for them ---------------

    async def offer(self, peer: str) -> Offer:
        """This side's half of a connection with the FFN actor ``peer``."""
        return await asyncio.to_thread(self._running().offer, peer)

    async def connect(self, offer: Offer) -> None:
        """Complete a connection; raises PeerMismatch when the peer serves something else.

        A peer that the table in use names may get frames at once: connect its side first.
        """
        await asyncio.to_thread(self._running().connect, offer)

    async def disconnect(self, peer: str) -> None:
        """Forget an FFN actor; a step that waits for it asks others instead."""
        await asyncio.to_thread(self._running().disconnect, peer)

    async def adopt(self, table: ExpertTable) -> int:
        """Use an expert table; returns the epoch once it (or a newer one) is in use.

        That is before the next step, at once when there is none, also while a step waits for a
        table. The same epoch again changes nothing.

        Raises:
            AffluxError: codes ``old_epoch``, ``unknown_peer`` (not connected), ``bad_table``; the
                table in use stays in use.
        """
        engine = self._running()
        used = await asyncio.to_thread(engine.adopt, table)
        self._inbox.put(engine.client.adoption.use_pending)  # wakes an idle engine
        epoch = await asyncio.wrap_future(used)
        if self.state == "loaded":
            self.state = "ready"
        return epoch

    # -- requests --------------------------------------------------------------------------------

    async def add_request(self, request: Any, emitted: Sequence[int] = ()) -> None:
        """Queue an ``EngineCoreRequest``; its outputs go to ``outputs(request.client_index)``.

        Args:
            emitted: output tokens that the client has from another actor; the request goes on
                after them.

        Raises:
            AffluxError: the actor has no expert table yet or is stopping (``not_running``), or the
                request can't go on from ``emitted`` (``replay_refused``).
        """
        if self.state != "ready":
            raise AffluxError(f"attention actor is {self.state}, not ready", code="not_running")
        if not emitted:
            await self._on_engine(lambda engine: engine.add(request))
            return
        prepared = await self._on_engine(lambda engine: engine.prepare(request))
        await replay.grammar_ready(prepared)
        await self._on_engine(lambda engine: engine.admit(prepared, emitted))

    async def abort(self, request_ids: list[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        await self._on_engine(lambda engine: engine.abort(request_ids))

    async def outputs(self, client_index: int) -> AsyncIterator[Any]:
        """Stream of ``EngineCoreOutputs`` for one client, after a None that says it has begun.

        A new call takes over from an older one, whose stream ends and whose requests are aborted:
        it is another client under the same index, or the same one, which starts them again. A
        client that isn't heard of for 60 s (see ``listening``) loses its stream and its requests.
        """
        if self._outboxes.listened(client_index):
            await self._on_engine(lambda engine: self._take_over(engine, client_index))
        yield None
        async for message in self._outboxes.listen(client_index):
            yield message

    def _take_over(self, engine: AttentionEngine, client: int) -> None:
        engine.abort_client(client)
        # After what the engine has sent so far, and before anything that it sends from now on.
        self._call_on_loop(self._outboxes.renew, client)

    async def listening(self, client_index: int) -> None:
        """A client's sign of life. Ray doesn't tell a stream that its reader has died."""
        self._outboxes.heard(client_index)

    async def utility(self, method: str, *args: Any) -> Any:
        """Call one of vLLM's engine-core utilities by name.

        Raises:
            AffluxError: a method that an attention actor does not offer.
        """
        if method not in UTILITIES:
            raise AffluxError(
                f"engine utility {method!r} is not offered; offered are {sorted(UTILITIES)}",
                code="no_such_utility",
            )
        return await self._on_engine(lambda engine: getattr(engine.core, method)(*args))

    # -- facts -----------------------------------------------------------------------------------

    async def telemetry(self, since: int = 0) -> dict[str, Any]:
        """Engine steps above the cursor ``since``; see ``AttentionMetrics.telemetry``.

        Raises:
            AffluxError: code ``no_telemetry``.
        """
        if self._metrics is None:
            raise no_telemetry(self.state)
        return await asyncio.to_thread(self._metrics.telemetry, since)

    async def ping(self) -> str:
        """State; raises when the actor has failed."""
        if self.state == "failed":
            raise AffluxError(f"attention actor failed: {self.error}", code="actor_failed")
        return self.state

    async def remember(self, note: dict[str, Any]) -> None:
        """Keep the manager's note for a manager that comes after it; the highest number wins.

        Args:
            note: plain data with an int ``number``.
        """
        if self._note is None or note["number"] >= self._note["number"]:
            self._note = note

    async def watch(self, seen: int = 0, timeout_s: float = 2.0) -> dict[str, Any]:
        """State and faults; waits up to ``timeout_s`` for something that the caller has not seen.

        Args:
            seen: number of the newest fault that the caller knows.

        Returns:
            state, error, epoch, faults (newer than ``seen``), number (of the newest fault),
            running and waiting (requests), stalled_s (how long a step has waited for a table),
            wire_s (per FFN actor, see ``Endpoint.take_wire_s``).
        """
        news = self._news
        if not self._has_news(seen):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(news.wait(), timeout_s)
        engine = self._engine
        facts: dict[str, Any] = {"state": self.state, "error": self.error}
        if engine is None:
            nothing = {"epoch": 0, "faults": [], "number": 0}
            idle = {"running": 0, "waiting": 0, "stalled_s": 0.0, "wire_s": {}}
            return facts | nothing | idle
        faults = engine.client.faults
        running, waiting = engine.core.scheduler.get_request_counts()
        wire_s = await asyncio.to_thread(engine.endpoint.take_wire_s)
        engine.client.adoption.avoid(self._nearness.hear(wire_s, time.monotonic()))
        return facts | {
            "epoch": engine.client.epoch,
            "faults": [fault for fault in faults if fault.number > seen],
            "number": faults[-1].number if faults else 0,
            "running": running,
            "waiting": waiting,
            "stalled_s": engine.client.adoption.stalled_s,
            "wire_s": wire_s,
        }

    def _has_news(self, seen: int) -> bool:
        if self.state == "failed":
            return True
        faults = self._engine.client.faults if self._engine else []
        return bool(faults) and faults[-1].number > seen

    def _ring(self) -> None:
        self._news.set()
        self._news = asyncio.Event()  # who comes later waits for the next news

    async def info(self) -> dict[str, Any]:
        """Plain facts about this actor; answers while a step runs."""
        facts: dict[str, Any] = {
            "role": "attention",
            "state": self.state,
            "error": self.error,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "note": self._note,
            "metrics": self._metrics.address if self._metrics is not None else None,
        }
        engine = self._engine
        if engine is None:
            return facts
        scheduler = engine.core.scheduler
        config = engine.vllm_config
        running, waiting = scheduler.get_request_counts()
        last = engine.last_error
        return facts | {
            "name": engine.config.name,
            "model": engine.config.model,
            "digest": engine.checkpoint.digest,
            "dtype": engine.geometry.dtype,
            "epoch": engine.client.epoch,
            "table": engine.client.table,
            "masked": sorted(engine.client.adoption.masked),
            "peers": sorted(engine.endpoint.peers),
            "weight_bytes": engine.weight_bytes,
            "max_model_len": config.model_config.max_model_len,
            "num_gpu_blocks": config.cache_config.num_gpu_blocks,
            "block_size": config.cache_config.block_size,
            "running": running,
            "waiting": waiting,
            "lanes": list(engine.chooser.recent)[-1:] or [1],
            "stats": vars(engine.client.stats).copy(),
            "last_error": f"{type(last).__name__}: {last}" if last else None,
            "last_error_at": engine.last_error_at,
        }
