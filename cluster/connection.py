"""How a process reaches a deployment: its Ray cluster, a connection to that, its manager.

Shared by what starts and stops deployments (``launcher.py``) and by what asks and changes them
(``verbs.py``). Starts nothing.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray._private.worker as ray_worker
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from actors.errors import AffluxError
from cluster import ray_head, records
from cluster.manager import find_manager
from cluster.names import NAMESPACE
from cluster.records import Record

ASK_S = 20.0
"""How long a manager may take to answer."""

_TRY_AGAIN = "what serves goes on serving; try again"


class NotRunning(AffluxError):
    """There is no deployment of this name."""

    code = "not_running"


class NoRay(AffluxError):
    """The Ray cluster at the given address can't be reached."""

    code = "no_ray"


class ManagerAway(AffluxError):
    """The deployment's manager does not answer. Serving does not depend on it."""

    code = "manager_away"

    @classmethod
    def because(cls, error: RayError) -> ManagerAway:
        """From what Ray says."""
        if isinstance(error, ActorUnavailableError):
            return cls(f"the manager is restarting or out of reach; {_TRY_AGAIN}")
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return cls(f"the manager does not answer: {first}; {_TRY_AGAIN}")

    @classmethod
    def silent(cls, timeout_s: float) -> ManagerAway:
        """From a deadline that has passed."""
        return cls(f"the manager did not answer within {timeout_s:g} s; {_TRY_AGAIN}")


@contextmanager
def connected(record: Record) -> Iterator[None]:
    """Inside, this process is connected to the deployment's Ray cluster.

    A connection that exists already is used as it is and stays open.

    Raises:
        NoRay: nothing answers there, or this process is connected to another cluster.
    """
    if ray.is_initialized():
        current = ray.get_runtime_context().gcs_address
        if current != record.address:
            raise NoRay(
                f"this process is connected to the Ray cluster {current}, but {record.name} is in "
                f"{record.address}; call ray.shutdown() first"
            )
        yield
        return
    with ray_head.credentials(record.ray), _unprompted():
        _connect(record)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _unprompted() -> Iterator[None]:
    """Ray tells every driver when a node is lost, on standard output, whatever ``log_to_driver``
    says; what ``afflux status --json`` prints would be no JSON."""
    before = ray_worker._worker_logs_enabled
    ray_worker._worker_logs_enabled = False
    try:
        yield
    finally:
        ray_worker._worker_logs_enabled = before


@contextmanager
def manager_of(name: str, address: str | None = None) -> Iterator[Any]:
    """Inside, connected to the deployment; gives the Ray handle of its manager.

    Args:
        address: the Ray cluster to look in when this machine has no record of the deployment.

    Raises:
        NotRunning: there is no such deployment.
        NoRay: its Ray cluster does not answer.
    """
    record = records.load(name)
    if record is None:
        found = find_ray(address)
        if found is None:
            raise _not_running(name)
        record = Record(name=name, address=found, url="")
    if record.ray is not None and not ray_head.alive(record.ray):
        raise NotRunning(
            f"{name} is not running any more: its Ray ended; clean up with: afflux down --name "
            f"{name}"
        )
    with connected(record):
        manager = find_manager(name)
        if manager is None:
            raise _not_running(name)
        yield manager


def get(call: Any, timeout_s: float) -> Any:
    """``ray.get`` with a deadline; an error of our own code is raised as itself.

    Raises:
        ManagerAway: the actor that was asked is away or silent.
    """
    try:
        return ray.get(call, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, AffluxError):
            raise error.cause from None
        raise
    except RayActorError as error:
        raise ManagerAway.because(error) from None
    except GetTimeoutError:
        raise ManagerAway.silent(timeout_s) from None


def find_ray(address: str | None) -> str | None:
    """Address of the Ray cluster to join; None for a new one of our own.

    Args:
        address: ``host:port``; ``auto``: the one that ``ray start`` left on this machine;
            ``local``: never an existing one; None: ``auto`` if there is one.

    Raises:
        NoRay: ``auto`` found none.
    """
    if address == "local":
        return None
    if address not in (None, "auto"):
        return address
    from ray._private.services import canonicalize_bootstrap_address

    with suppress(ConnectionError):  # none was started by `ray start`
        found = canonicalize_bootstrap_address("auto")
        if found is not None and answers(found):
            return found
    if address == "auto":
        raise NoRay(
            "found no Ray cluster on this machine that `ray start` started; give --address "
            "host:port, or leave it out to have one started"
        )
    return None


def answers(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except (OSError, ValueError):
        return False


def _connect(record: Record) -> None:
    level = logging.getLogger("ray.serve")
    level.setLevel(logging.ERROR)
    try:
        ray.init(
            address=record.address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, RayError, RuntimeError, ValueError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NoRay(
            f"cannot reach the Ray cluster at {record.address}: {first}. Check --address (or "
            "RAY_ADDRESS), and that its token is known here if it wants one"
        ) from None


def _not_running(name: str) -> NotRunning:
    flags = "" if name == "afflux" else f" --name {name}"
    return NotRunning(f"{name} is not running; start it with: afflux up{flags}")
