"""The attention actor: an ``AttentionEngine`` on a thread, behind asynchronous methods.

``cluster`` turns the class into a Ray actor; nothing here imports Ray, so it runs in a plain
process too. The engine, its endpoint and every change of peers or table live on one thread; the
event loop only passes messages. Outputs leave as one message per engine step and client, not one
per token.
"""

import asyncio
import logging
import os
import queue
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import Any

from actors.engine import AttentionConfig, AttentionEngine
from actors.errors import AffluxError
from actors.table import ExpertTable
from actors.transport.endpoint import Offer

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
_END = object()


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
        self._outboxes: dict[int, asyncio.Queue[Any]] = {}
        self._listened: set[int] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()

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
            self._engine = AttentionEngine(self.config)
            self.state = "loaded"
        except BaseException as error:
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._serve(self._engine)
            self.state = "stopped"
        except BaseException as error:
            logger.exception("engine loop of %s died", self.config.name)
            self.state, self.error = "failed", f"{type(error).__name__}: {error}"
        finally:
            self._refuse_inbox()
            self._engine.close()
            for client in list(self._outboxes):
                self._send(client, _END)

    def _serve(self, engine: AttentionEngine) -> None:
        while not self._stopping.is_set():
            self._drain_inbox(block=not engine.has_work)
            if not engine.has_work:
                continue
            for client, outputs in engine.step().items():
                self._send(client, outputs)

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

    def _send(self, client: int, message: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._outbox(client).put_nowait, message)

    def _outbox(self, client: int) -> asyncio.Queue[Any]:
        return self._outboxes.setdefault(client, asyncio.Queue())

    async def _on_engine(self, work: Callable[[AttentionEngine], Any]) -> Any:
        """Run ``work`` on the engine's thread, between steps, and return its result."""
        engine = self._engine
        if engine is None or self._stopping.is_set() or self.state == "failed":
            raise AffluxError(
                f"attention actor is {self.state}" + (f": {self.error}" if self.error else ""),
                code="not_running",
            )
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
        """End the engine loop after the step in progress; idempotent."""
        self._stopping.set()
        self._inbox.put(lambda: None)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 30.0)

    # -- peers and table -------------------------------------------------------------------------

    async def offer(self, peer: str) -> Offer:
        """This side's half of a connection with the FFN actor ``peer``."""
        return await self._on_engine(lambda engine: engine.offer(peer))

    async def connect(self, offer: Offer) -> None:
        """Complete a connection; raises PeerMismatch when the peer serves something else."""
        await self._on_engine(lambda engine: engine.connect(offer))

    async def disconnect(self, peer: str) -> None:
        """Forget an FFN actor."""
        await self._on_engine(lambda engine: engine.endpoint.disconnect(peer))

    async def adopt(self, table: ExpertTable) -> int:
        """Use an expert table from the next step on; returns its epoch."""
        await self._on_engine(lambda engine: engine.adopt(table))
        self.state = "ready"
        return table.epoch

    # -- requests --------------------------------------------------------------------------------

    async def add_request(self, request: Any) -> None:
        """Queue an ``EngineCoreRequest``; its outputs go to ``outputs(request.client_index)``.

        Raises:
            AffluxError: the actor has no expert table yet or is stopping.
        """
        if self.state != "ready":
            raise AffluxError(f"attention actor is {self.state}, not ready", code="not_running")
        await self._on_engine(lambda engine: engine.add(request))

    async def abort(self, request_ids: list[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        await self._on_engine(lambda engine: engine.abort(request_ids))

    async def outputs(self, client_index: int) -> AsyncIterator[Any]:
        """Stream of ``EngineCoreOutputs`` for one client. A new call takes over from an old one."""
        if client_index in self._listened:
            self._outboxes.pop(client_index).put_nowait(_END)
        self._listened.add(client_index)
        outbox = self._outbox(client_index)  # with what came before anybody listened
        while True:
            message = await outbox.get()
            if message is _END:
                return
            yield message

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

    async def ping(self) -> str:
        """State; raises when the actor has failed."""
        if self.state == "failed":
            raise AffluxError(f"attention actor failed: {self.error}", code="actor_failed")
        return self.state

    async def info(self) -> dict[str, Any]:
        """Plain facts about this actor; answers while a step runs."""
        facts: dict[str, Any] = {
            "role": "attention",
            "state": self.state,
            "error": self.error,
            "pid": os.getpid(),
            "host": socket.gethostname(),
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
