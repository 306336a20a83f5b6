"""From a spec to a running deployment and back: the functions behind ``afflux up`` and ``down``.

Finds or starts Ray, has the manager start the actors, deploys the frontend with Serve, and waits
until it answers. Whatever fails, nothing that was started here is left behind. Not for printing.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from actors.errors import AffluxError
from cluster import companion, preflight, ray_actors, ray_head, records
from cluster.app import application
from cluster.connection import (
    ASK_S,
    ManagerAway,
    NoRay,
    NotRunning,
    answers,
    connected,
    find_ray,
    get,
)
from cluster.manager import connect_manager, find_manager
from cluster.ray_head import HeadOptions
from cluster.records import Record
from cluster.spec import ROLES, ClusterSpec
from cluster.status import ActorEvent, ClusterHandle, DownReport
from cluster.verbs import change, changes, flip, rebalance, retire, scale, status, watch

__all__ = [
    "AlreadyUp",
    "FrontendFailed",
    "ManagerAway",
    "NoRay",
    "NotRunning",
    "ServeElsewhere",
    "change",
    "changes",
    "connected",
    "down",
    "flip",
    "rebalance",
    "retire",
    "scale",
    "status",
    "up",
    "watch",
]

OnEvent = Callable[[ActorEvent], None]

STOP_S = 30.0


class AlreadyUp(AffluxError):
    """A deployment of this name runs already, with another spec."""

    code = "already_up"


class ServeElsewhere(AffluxError):
    """The Ray cluster runs a Serve that this deployment can't share."""

    code = "serve_elsewhere"


class FrontendFailed(AffluxError):
    """The actors are ready but the HTTP server is not."""

    code = "frontend_failed"


def up(
    spec: ClusterSpec,
    *,
    address: str | None = None,
    on_event: OnEvent | None = None,
    head: HeadOptions | None = None,
) -> ClusterHandle:
    """Start a deployment and wait until it answers over HTTP.

    Args:
        address: the Ray cluster to use: ``host:port``; ``auto``: the one that ``ray start`` left
            on this machine; ``local``: always a new one of our own; None: ``auto`` if there is
            one, else ``local``.
        on_event: told of every step.
        head: what a Ray of our own gets; by default what the spec asks for.

    Raises:
        AffluxError: one of this module's, the manager's or the preflight checks'.
    """
    note = _Notes(on_event)
    companion.check(spec)
    record = records.load(spec.name)
    if record is not None:
        handle = _running(spec, record)
        if handle is not None:
            return handle
        _clean_up(record)
    found = find_ray(address)
    if found is None:
        if ray.is_initialized():
            current = ray.get_runtime_context().gcs_address
            raise NoRay(
                f"this process is connected to the Ray cluster {current}; call ray.shutdown() "
                "first, or use that cluster (address)"
            )
        preflight.check_port(spec.frontend.host, spec.frontend.port)
        preflight.check_model(spec)
        note("starting Ray on this machine")
        keys = (spec.frontend.api_keys_env, spec.frontend.admin_keys_env)
        secret = tuple(variable for variable in keys if variable)
        ray_record, found = ray_head.start(head or _head_for(spec), without_env=secret)
        record = Record(name=spec.name, address=found, url=_url(spec), ray=ray_record)
        records.save(record)
    else:
        record = Record(name=spec.name, address=found, url=_url(spec))
    try:
        note(f"connecting to Ray at {found}")
        with connected(record):
            known = find_manager(spec.name)
            if known is not None:
                return _same_or_refuse(spec, known, record)
            _deploy(spec, note)
        records.save(record)
    except BaseException:
        if record.ray is not None:
            if kept := records.keep_logs(record):
                note(f"logs of the failed start: {kept}")
            ray_head.stop(record.ray)
            records.forget(spec.name)
        raise
    return ClusterHandle(
        name=spec.name, url=record.url, address=found, started_ray=record.ray is not None
    )


def down(name: str, *, address: str | None = None) -> DownReport:
    """Stop a deployment, and Ray with it if ``up`` started that. Stopping nothing is fine.

    Args:
        address: the Ray cluster to look in when this machine has no record of the deployment.
    """
    record = records.load(name)
    if record is None:
        found = find_ray(address)
        if found is None:
            return DownReport(name=name, found=False)
        record = Record(name=name, address=found, url="")
    stopped: tuple[str, ...] | None = None
    if record.ray is None or ray_head.alive(record.ray):
        with suppress(NoRay), connected(record):
            stopped = _undeploy(name)
    count, left = ray_head.stop(record.ray) if record.ray is not None else (0, ())
    if not left:
        records.forget(name)
    return DownReport(
        name=name,
        found=stopped is not None or record.ray is not None,
        actors=stopped or (),
        stopped_ray=record.ray is not None,
        processes=count,
        left=left,
    )


def _head_for(spec: ClusterSpec) -> HeadOptions:
    """Ray's own count of CPUs and GPUs, plus the custom resources and labels that the spec names.

    Those exist to tell node types apart; on the one node of a Ray of our own, all are wanted.
    """
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    for role in ROLES:
        pool = spec.pool(role)
        for name, amount in pool.resources.custom.items():
            resources[name] = resources.get(name, 0.0) + amount * pool.max
        for key, value in (*pool.labels.items(), *spec.frontend.labels.items()):
            if not value.startswith("!") and "(" not in value:
                labels.setdefault(key, value)
    return HeadOptions(resources=resources, labels=labels)


# -- up, inside the connection ---------------------------------------------------------------------


def _deploy(spec: ClusterSpec, note: _Notes) -> None:
    had_serve = _check_serve(spec)
    ray_actors.check_room(spec, count_frontend=True)
    manager = connect_manager(spec)
    try:
        start = manager.start.remote(spec.model_dump(mode="json"), count_frontend=True)
        note("starting Ray Serve")
        _serve(spec, had_serve, note)
        _wait_until_ready(spec, manager, start, note)
        get(manager.set_url.remote(_url(spec)), ASK_S)
    except BaseException:
        with suppress(Exception):
            _undeploy(spec.name, shut_serve_down=not had_serve)
        raise


def _check_serve(spec: ClusterSpec) -> bool:
    """Whether Serve runs already. Raises ServeElsewhere when the deployment can't share it."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        preflight.check_port(spec.frontend.host, spec.frontend.port)
        return False
    options = client.http_config
    if (options.host, options.port) != (spec.frontend.host, spec.frontend.port):
        raise ServeElsewhere(
            f"Serve in this Ray cluster listens on {options.host}:{options.port} already, and "
            f"{spec.name} wants {spec.frontend.host}:{spec.frontend.port}; set frontend.host and "
            f"frontend.port to the former (--set frontend.port={options.port}), or use another Ray "
            "cluster (--address local starts one)"
        )
    for name, app in client.get_serve_details().get("applications", {}).items():
        if name != spec.name and app.get("route_prefix") == "/":
            raise ServeElsewhere(
                f"Serve in this Ray cluster runs the application {name!r} at '/' already; delete "
                "it, or use another Ray cluster (--address local starts one)"
            )
    return True


def _serve(spec: ClusterSpec, had_serve: bool, note: _Notes) -> None:
    from ray import serve
    from ray.serve.api import RunTarget

    if not had_serve:
        try:
            serve.start(http_options={"host": spec.frontend.host, "port": spec.frontend.port})
        except (RayActorError, TimeoutError) as error:
            # Serve ends a proxy that is not ready within 5 s, and starts another that has longer,
            # and so on: the start's own limit says when it is enough.
            note(f"Serve starts its HTTP proxy again ({type(error).__name__})")
    serve.run_many(
        [RunTarget(application(spec, owned_by_serve=False), name=spec.name, route_prefix="/")],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _wait_until_ready(spec: ClusterSpec, manager: Any, start: Any, note: _Notes) -> None:
    """Follow the start until the manager and the frontend are ready; raises what went wrong."""
    from ray import serve

    deadline = time.monotonic() + spec.startup_timeout_s + ASK_S
    told = 0
    actors_ready = False
    while time.monotonic() < deadline:
        for event in get(manager.events.remote(told, 0.3), ASK_S):
            told = event.number
            note.event(event)
        if not actors_ready and ray.wait([start], timeout=0)[0]:
            get(start, ASK_S)
            actors_ready = True
            note("starting the HTTP server")
        app = serve.status().applications.get(spec.name)
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            get(start, spec.startup_timeout_s)  # the actors' failure says more
            reasons = [app.message, *(d.message for d in app.deployments.values())]
            raise FrontendFailed(
                f"the HTTP server did not start: {' '.join(filter(None, reasons))}"
            )
        if actors_ready and app is not None and app.status == "RUNNING" and _healthy(_url(spec)):
            return
        time.sleep(0.1)
    raise FrontendFailed(
        f"the HTTP server was not ready within {spec.startup_timeout_s:g} s; "
        "raise startup_timeout_s, or see Serve's logs"
    )


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


# -- down, inside the connection -------------------------------------------------------------------


def _undeploy(name: str, *, shut_serve_down: bool = True) -> tuple[str, ...] | None:
    """Delete the application and stop manager and actors; None if there was nothing."""
    from ray import serve

    manager = find_manager(name)
    client = _serve_client()
    has_app = client is not None and name in serve.status().applications
    if manager is None and not has_app:
        return None
    if has_app:
        serve.delete(name)
    stopped: tuple[str, ...] = ()
    if manager is not None:
        with suppress(RayError, ManagerAway):
            stopped = tuple(actor.name for actor in get(manager.stop.remote(), STOP_S))
        ray_actors.kill(manager)
    ray_actors.remove_groups(name)
    if client is not None and shut_serve_down and not serve.status().applications:
        serve.shutdown()
    return stopped


def _serve_client() -> Any:
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


# -- a deployment that is there already ------------------------------------------------------------


def _running(spec: ClusterSpec, record: Record) -> ClusterHandle | None:
    """The handle of a deployment that this machine has a record of, if it still runs."""
    if record.ray is not None and not ray_head.alive(record.ray):
        return None
    if record.ray is None and not answers(record.address):
        return None
    with connected(record):
        manager = find_manager(spec.name)
        return None if manager is None else _same_or_refuse(spec, manager, record)


def _same_or_refuse(spec: ClusterSpec, manager: Any, record: Record) -> ClusterHandle:
    flags = "" if spec.name == "afflux" else f" --name {spec.name}"
    running = ClusterSpec.model_validate(get(manager.spec_data.remote(), ASK_S))
    report = get(manager.status.remote(), ASK_S)
    if running != spec or report.health not in ("ready", "degraded", "starting"):
        raise AlreadyUp(
            f"{spec.name} is up already"
            + (" with another spec" if running != spec else f", but {report.health}")
            + f"; look at it with: afflux status{flags}; stop it with: afflux down{flags}; or "
            "choose another name (--name)"
        )
    return ClusterHandle(
        name=spec.name,
        url=report.url or _url(spec),
        address=record.address,
        started_ray=record.ray is not None,
        already_running=True,
    )


def _clean_up(record: Record) -> None:
    """Remove what a dead deployment left: a Ray of our own, and the record."""
    if record.ray is not None:
        ray_head.stop(record.ray)
    records.forget(record.name)


# -- small things ----------------------------------------------------------------------------------


class _Notes:
    """Passes events on, and adds those of the launcher itself."""

    def __init__(self, on_event: OnEvent | None):
        self._on_event = on_event
        self._began = time.monotonic()

    def __call__(self, detail: str) -> None:
        self.event(ActorEvent(actor="", role=None, state="pending", detail=detail))

    def event(self, event: ActorEvent) -> None:
        """Pass an event on with the time since ``up`` was called."""
        if self._on_event is not None:
            seconds = time.monotonic() - self._began
            self._on_event(event.model_copy(update={"seconds": seconds}))


def _url(spec: ClusterSpec) -> str:
    host = spec.frontend.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{spec.frontend.port}"
