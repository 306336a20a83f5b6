"""The HTTP server: vLLM's OpenAI app over an ``AttentionPool``, as a Ray Serve deployment.

Every replica builds its own app, pool and tokenizer, and follows the manager's list of attention
actors. Not for starting actors (``manager.py``) or for building applications (``app.py``).
"""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp

from actors.errors import AffluxError
from actors.metrics.exporter import Exporter, plain_page, registry_page
from cluster import ray_actors
from cluster.admin import AdminMount, make_admin
from cluster.admission import Admission
from cluster.api_keys import KeyGuard, KeyRing
from cluster.arrivals import StampArrivals
from cluster.configs import tracing
from cluster.disconnects import DisconnectOnCancel
from cluster.discovery import VLLM_PATH
from cluster.reporting import Reports
from cluster.request_metrics import RequestMetrics
from cluster.spec import ClusterSpec

if TYPE_CHECKING:
    from cluster.pooled_llm import PooledLLM
    from cluster.tracing import FrontDoorTraces

logger = logging.getLogger(__name__)

FOLLOW_S = 10.0
"""How long one question about changed members may stay open at the manager. Less than
``discovery.FRONTEND_SILENCE_S``: by asking, a replica shows that it lives."""

RETRY_S = 0.5
"""Pause before a manager that is away is asked again."""


@serve.deployment(name="frontend")
@serve.ingress()
class Frontend:
    """One replica of the HTTP server.

    Args:
        spec: the cluster's spec as JSON data.
        keys: who may use it.
        admin_keys: who may use what is under /admin; nobody without any.
        owned_by_serve: the deployment ends with this application.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        keys: KeyRing,
        admin_keys: KeyRing,
        owned_by_serve: bool = True,
    ):
        self.owned_by_serve = owned_by_serve
        self.spec = ClusterSpec.model_validate(spec)
        self.keys = keys
        self.admin_keys = admin_keys
        self.metrics: RequestMetrics | None = None
        self.exporter: Exporter | None = None
        self._follower: asyncio.Task[None] | None = None
        self._reports: Reports | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from cluster.manager import connect_manager

        context = serve.get_replica_context()
        manager = await asyncio.to_thread(connect_manager, self.spec)
        start = manager.start.remote(
            self.spec.model_dump(mode="json"),
            serve_app=context.app_name if self.owned_by_serve else None,
        )
        members, _ = await asyncio.gather(start, asyncio.to_thread(_import_vllm))
        name = f"frontend-{context.rank.rank}"
        if self.spec.metrics.enabled:
            self.metrics = RequestMetrics(self.spec.served_name, name, self.spec.slo)
            self.exporter = export(self.spec, self.metrics)
            self._reports = Reports(name, self.metrics)
            self._reports.listen(members)
        traces = trace(self.spec, name)
        self.llm, args = await make_llm(
            self.spec,
            members,
            client_index=context.rank.rank,
            metrics=self.metrics,
            traces=traces,
        )
        facts = None
        if self.exporter is not None:
            facts = {
                "name": name,
                "metrics": self.exporter.address,
                "node_ip": ray_actors.node_ip(),
            }
        self._follower = asyncio.create_task(self._follow(manager, members["version"], facts))
        limit = self.spec.frontend.max_requests
        app = await make_app(self.llm, args, self.keys, limit, self.metrics)
        if traces is not None:
            app = traces.around(app)
        variable = self.spec.frontend.admin_keys_env
        return AdminMount(app, make_admin(manager, self.admin_keys, variable))

    async def _follow(self, manager: Any, version: Any, facts: Mapping[str, str] | None) -> None:
        """Keep the pool's members as the manager has them; serve on while it is away.

        ``facts`` tell the manager who asks and where its metrics are.
        A version is compared for equality only: a restarted manager counts anew.
        """
        while True:
            try:
                members = await manager.members.remote(version, FOLLOW_S, facts)
            except RayError as error:
                logger.warning("the manager does not answer: %s", str(error).splitlines()[0])
                await asyncio.sleep(RETRY_S)
                continue
            version = members["version"]
            if self._reports is not None:
                self._reports.listen(members)
            try:
                adopt_members(self.llm, members)
            except ValueError as error:  # serve on with the members that did fit
                logger.error("%s", error)


def export(spec: ClusterSpec, metrics: RequestMetrics) -> Exporter | None:
    """Serve a replica's metrics, and vLLM's own under another path; None where that fails."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    pages = {
        "/metrics": registry_page(metrics.families.registry),
        VLLM_PATH: plain_page(get_prometheus_registry()),
    }
    try:
        return Exporter(spec.metrics.host, 0, pages)
    except AffluxError as error:  # requests matter more
        logger.error("this frontend serves without metrics: %s", error)
        return None


def trace(spec: ClusterSpec, name: str) -> FrontDoorTraces | None:
    """What makes a replica's spans; None, and nothing imported, when the spec asks for none."""
    config = tracing(spec)
    if config is None:
        return None
    from actors.tracing import Tracing
    from cluster.tracing import FrontDoorTraces

    return FrontDoorTraces(Tracing(config, "afflux-frontend", name))


async def make_llm(
    spec: ClusterSpec,
    members: Mapping[str, Any],
    *,
    client_index: int,
    metrics: RequestMetrics | None = None,
    traces: FrontDoorTraces | None = None,
) -> tuple[PooledLLM, Namespace]:
    """The engine client of one replica, and the server arguments that it was made from.

    Args:
        members: what the manager tells about the attention actors: handles by name under
            ``attention``, the names of draining ones under ``draining``, and under ``not_ready``
            why the deployment can't serve now, or None.
        client_index: the replica's rank. Replicas don't share one; vLLM sends statistics that
            belong to nobody's request to number 0, so there should be a 0.
        metrics: told what happens to requests; None measures nothing.
        traces: makes spans of them; None traces nothing.
    """
    from cluster.pool import AttentionPool
    from cluster.pooled_llm import PooledLLM, engine_config, server_args
    from cluster.routing import Router

    args = server_args(spec)
    config = engine_config(args)
    router = Router(block_size=config.cache_config.block_size or 16)
    # Twice the pool's size: old and new actors overlap while the pool changes.
    pool = AttentionPool(
        client_index,
        capacity=2 * spec.attention.max,
        router=router,
        wait_s=spec.membership.wait_s,
        metrics=metrics,
        traces=traces,
    )
    llm = PooledLLM(config, pool, log_requests=args.enable_log_requests)
    adopt_members(llm, members)
    return llm, args


def adopt_members(llm: PooledLLM, members: Mapping[str, Any]) -> None:
    """Make the manager's list of members the pool's.

    Raises:
        ValueError: more actors than the pool has room for; those that fit are in.
    """
    llm.not_ready = members["not_ready"]
    llm.pool.set_actors(members["attention"], members.get("draining") or ())


async def make_app(
    llm: PooledLLM,
    args: Namespace,
    keys: KeyRing,
    max_requests: int,
    metrics: RequestMetrics | None = None,
) -> ASGIApp:
    """vLLM's OpenAI app over ``llm``, guarded by ``keys``; ``max_requests`` in hand at most."""
    from vllm import envs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    # A stored response may be made in the background, after its client has gone.
    on_abandoned = None if envs.VLLM_ENABLE_RESPONSES_API_STORE else llm.abandon
    on_refused = None if metrics is None else partial(metrics.rejected, "queue_full")
    admission = Admission(app, max_requests, on_refused=on_refused)
    guarded = KeyGuard(admission, keys)  # strangers take no place
    return StampArrivals(DisconnectOnCancel(guarded, on_abandoned))


def _import_vllm() -> None:
    """The slow import, off the event loop, while the actors load."""
    import vllm.entrypoints.launchers.api_server.app_state
    import vllm.entrypoints.launchers.app
    import vllm.v1.engine.async_llm  # noqa: F401
