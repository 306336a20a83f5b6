"""A process of the deployment: imported and ready, then an attention or an FFN actor for life.

``cluster`` turns the class into a Ray actor. A worker without a role is *warm*: it has imported
everything, so taking a role takes about the time of loading weights. The role is an
``AttentionActor`` or an ``FFNActor``, to which every other method is passed on. Nothing here
imports Ray or knows of the manager.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
import platform
import sys
import threading
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from actors.errors import AffluxError
from actors.transport import interfaces

_NICE = 10  # of imports, above the process: a tenth of what a thread that serves gets


class Worker:
    """One process. Asynchronous, all methods are safe to call at any time."""

    def __init__(self) -> None:
        self._role: Any = None
        self._preloading: asyncio.Future[None] | None = None
        self._notes: dict[str, Any] = {}
        self._state = "created"
        self._importer = 0  # thread id while imports are under way

    # -- without a role --------------------------------------------------------------------------

    async def preload(self) -> str:
        """Import what either role needs, at a low priority; returns the state, ``warm``."""
        if self._role is None:
            self._state = "importing"
            if self._preloading is None:
                self._preloading = asyncio.ensure_future(self._import())
            await asyncio.shield(self._preloading)
            if self._role is None:
                self._state = "warm"
        return await self.ping()

    async def start(self, config: Any, devices: Sequence[int] | None = None) -> dict[str, Any]:
        """Take a role and load; returns ``info()``. The same config again returns at once.

        Args:
            config: an ``AttentionConfig`` or an ``FFNConfig``; decides the role.
            devices: GPUs of the machine to use, for a process that Ray gave none.

        Raises:
            AffluxError: code ``already_started``: it has another role or another config; else as
                ``AttentionActor.start`` and ``FFNActor.start``.
        """
        if devices:  # before anything in this process touches CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        if self._preloading is not None:
            self._hurry()
            await asyncio.shield(self._preloading)
        role = _role_of(config)
        interfaces.choose(config.address)
        if self._role is None:
            self._role = role()
        elif not isinstance(self._role, role):
            raise AffluxError(
                f"this process is an {type(self._role).__name__} for life, and can't become "
                f"{config.name}; start another worker",
                code="already_started",
            )
        await self._ask("start", config)
        return await self.info()

    # -- both roles ------------------------------------------------------------------------------

    async def ping(self) -> str:
        """State: ``created``, ``importing``, ``warm``, or the role's own."""
        return self._state if self._role is None else await self._ask("ping")

    async def info(self) -> dict[str, Any]:
        """Plain facts; ``role`` is None for a worker without one."""
        if self._role is None:
            facts = {"pid": os.getpid(), "host": platform.node()}
            return {"role": None, "state": self._state, "note": self._notes, **facts}
        return await self._ask("info")

    async def watch(self, seen: int = 0, timeout_s: float = 2.0) -> dict[str, Any]:
        """Wait for something that the manager should know; see the roles."""
        if self._role is None:
            await asyncio.sleep(timeout_s)
            return {"state": self._state, "error": None, "epoch": 0, "faults": [], "number": 0}
        return await self._ask("watch", seen, timeout_s)

    async def telemetry(self, since: int = 0) -> dict[str, Any]:
        """What the role has done lately, from the cursor ``since`` on; see the roles."""
        return await self._ask("telemetry", since)

    async def remember(self, note: Mapping[str, Any]) -> None:
        """Keep the manager's note, for a manager that has to start anew."""
        if self._role is not None:
            await self._ask("remember", note)
        elif note["number"] >= self._notes.get("number", 0):
            self._notes = dict(note)

    async def offer(self, peer: str) -> Any:
        """This side's half of a connection."""
        return await self._ask("offer", peer)

    async def connect(self, offer: Any) -> None:
        """Complete a connection."""
        await self._ask("connect", offer)

    async def disconnect(self, peer: str) -> None:
        """Forget a peer."""
        await self._ask("disconnect", peer)

    async def stop(self) -> None:
        """End the role's work; the process is ended by whoever started it."""
        if self._role is not None:
            await self._ask("stop")
        self._state = "stopped"

    # -- attention -------------------------------------------------------------------------------

    async def adopt(self, table: Any) -> int:
        """Use an expert table; returns its epoch once it is in use."""
        return await self._ask("adopt", table)

    async def add_request(self, request: Any, emitted: Sequence[int] = ()) -> None:
        """Queue a request; ``emitted`` are tokens that it has got elsewhere."""
        await self._ask("add_request", request, emitted)

    async def abort(self, request_ids: list[str]) -> None:
        """Forget requests."""
        await self._ask("abort", request_ids)

    async def outputs(self, client_index: int) -> AsyncIterator[Any]:
        """Stream of engine outputs for one client."""
        if self._role is None:
            raise _no_role("outputs")
        async for message in self._role.outputs(client_index):
            yield message

    async def listening(self, client_index: int) -> None:
        """A client's sign of life."""
        await self._ask("listening", client_index)

    async def utility(self, method: str, *args: Any) -> Any:
        """One of vLLM's engine utilities."""
        return await self._ask("utility", method, *args)

    # -- FFN -------------------------------------------------------------------------------------

    async def grow(self, experts: Mapping[int, Sequence[int]], offers: Iterable[Any] = ()) -> Any:
        """Hold these experts as well."""
        return await self._ask("grow", experts, list(offers))

    async def keep(self, experts: Mapping[int, Sequence[int]], epoch: int) -> None:
        """Drop every other expert and refuse older epochs."""
        await self._ask("keep", experts, epoch)

    async def export(self, experts: Mapping[int, Sequence[int]]) -> Any:
        """Let peers read these experts' weights from memory."""
        return await self._ask("export", experts)

    async def unexport(self, token: Any) -> None:
        """End an export."""
        await self._ask("unexport", token)

    async def loads(self) -> Any:
        """Pairs per layer and expert since the start."""
        return await self._ask("loads")

    # -- small things ----------------------------------------------------------------------------

    async def _import(self) -> None:
        """Import on a thread that yields to whatever serves on this machine."""

        def run() -> None:
            self._importer = threading.get_native_id()
            _set_priority(self._importer, _niceness() + _NICE)
            _import_all()

        with ThreadPoolExecutor(1, thread_name_prefix="preload") as executor:
            await asyncio.get_running_loop().run_in_executor(executor, run)
        self._importer = 0

    def _hurry(self) -> None:
        """Somebody waits for the imports now."""
        if self._importer:
            with suppress(OSError):  # needs a privilege; without it they take their time
                _set_priority(self._importer, _niceness())

    async def _ask(self, method: str, *args: Any) -> Any:
        """Call the role, off the event loop when the method blocks."""
        if self._role is None:
            raise _no_role(method)
        call = getattr(self._role, method)
        if inspect.iscoroutinefunction(call):
            return await call(*args)
        return await asyncio.to_thread(call, *args)


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, os.getpid())


def _set_priority(thread: int, nice: int) -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def _role_of(config: Any) -> type:
    from actors.ffn import FFNActor, FFNConfig

    if isinstance(config, FFNConfig):
        return FFNActor
    from actors.attention import AttentionActor
    from actors.engine import AttentionConfig

    if isinstance(config, AttentionConfig):
        return AttentionActor
    raise AffluxError(
        f"a worker takes an AttentionConfig or an FFNConfig, got {type(config).__name__}",
        code="bad_config",
    )


def _no_role(method: str) -> AffluxError:
    return AffluxError(f"a worker without a role can't {method}; start it first", "not_running")


_ATTENTION_MODULES = (
    "vllm.v1.engine.core",
    "vllm.model_executor.layers.quantization.online.base",  # every model loader imports it
    "actors.attention",
    "actors.runner",
    "actors.loader",
    "actors.experts_client",
    "actors.transport.endpoint",
)


def _import_all() -> None:
    from actors.ffn import preload

    preload()
    for module in _ATTENTION_MODULES:
        importlib.import_module(module)
    from actors.vllm_models import replace_kernels_now

    replace_kernels_now()
