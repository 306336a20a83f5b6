"""The HTTP server: vLLM's OpenAI app over an ``AttentionPool``, as a Ray Serve deployment.

Every replica builds its own app, pool and tokenizer, and follows the manager's list of attention
actors. Not for starting actors (``manager.py``) or for building applications (``app.py``).
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp

from cluster.api_keys import KeyGuard, KeyRing
from cluster.disconnects import DisconnectOnCancel
from cluster.spec import ClusterSpec

if TYPE_CHECKING:
    from cluster.pooled_llm import PooledLLM

logger = logging.getLogger(__name__)

FOLLOW_S = 30.0
"""How long one question about changed members may stay open at the manager."""


@serve.deployment(name="frontend")
@serve.ingress()
class Frontend:
    """One replica of the HTTP server.

    Args:
        spec: the cluster's spec as JSON data.
        keys: who may use it.
        owned_by_serve: the deployment ends with this application.
    """

    def __init__(self, spec: dict[str, Any], keys: KeyRing, owned_by_serve: bool = True):
        self.owned_by_serve = owned_by_serve
        self.spec = ClusterSpec.model_validate(spec)
        self.keys = keys
        self._follower: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from cluster.manager import connect_manager

        context = serve.get_replica_context()
        manager = await asyncio.to_thread(connect_manager, self.spec)
        start = manager.start.remote(
            self.spec.model_dump(mode="json"),
            serve_app=context.app_name if self.owned_by_serve else None,
        )
        members, _ = await asyncio.gather(start, asyncio.to_thread(_import_vllm))
        self.llm, args = await make_llm(
            self.spec, members["attention"], client_index=context.rank.rank
        )
        self._follower = asyncio.create_task(self._follow(manager, members["version"]))
        return await make_app(self.llm, args, self.keys)

    async def _follow(self, manager: Any, version: int) -> None:
        """Keep the pool's members as the manager has them; serve on while it is away."""
        while True:
            try:
                members = await manager.members.remote(version, FOLLOW_S)
                version = members["version"]
                self.llm.pool.set_actors(members["attention"])
                self.llm.not_ready = members["not_ready"]
            except RayError as error:
                logger.warning("the manager does not answer: %s", str(error).splitlines()[0])
                await asyncio.sleep(2.0)


async def make_llm(
    spec: ClusterSpec, actors: Mapping[str, Any], *, client_index: int
) -> tuple[PooledLLM, Namespace]:
    """The engine client of one replica, and the server arguments that it was made from.

    Args:
        actors: attention actors by name, ready to take requests.
        client_index: the replica's rank. Replicas don't share one; vLLM sends statistics that
            belong to nobody's request to number 0, so there should be a 0.
    """
    from cluster.pool import AttentionPool
    from cluster.pooled_llm import PooledLLM, engine_config, server_args
    from cluster.routing import Router

    args = server_args(spec)
    config = engine_config(args)
    router = Router(block_size=config.cache_config.block_size or 16)
    # Twice the pool's size: old and new actors overlap while the pool changes.
    pool = AttentionPool(client_index, capacity=2 * spec.attention.max, router=router)
    pool.set_actors(actors)
    return PooledLLM(config, pool, log_requests=args.enable_log_requests), args


async def make_app(llm: PooledLLM, args: Namespace, keys: KeyRing) -> ASGIApp:
    """vLLM's OpenAI app over ``llm``, guarded by ``keys``."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    return DisconnectOnCancel(KeyGuard(app, keys))


def _import_vllm() -> None:
    """The slow import, off the event loop, while the actors load."""
    import vllm.entrypoints.launchers.api_server.app_state
    import vllm.entrypoints.launchers.app
    import vllm.v1.engine.async_llm  # noqa: F401
