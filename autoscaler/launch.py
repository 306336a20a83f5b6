"""Starts the controller of a deployment, and talks to it: the functions behind ``afflux policy``.

``start`` is for the manager, inside Ray; everything else connects by the deployment's name, as
``cluster.verbs`` does. Not for deciding or printing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from actors.errors import AffluxError
from autoscaler.core import Mode
from autoscaler.journal import DecisionReport
from autoscaler.settings import check
from cluster import companion
from cluster.connection import ASK_S, get, manager_of
from cluster.names import NAMESPACE, controller_name
from cluster.spec import ClusterSpec


class NoController(AffluxError):
    """The deployment runs without a controller."""

    code = "no_controller"


def start(spec: ClusterSpec) -> Any:
    """The Ray handle of a deployment's controller, which is created if there is none.

    Raises:
        SpecError, BadPolicy: see ``settings.check``.
    """
    from autoscaler.controller import Controller

    check(spec)
    options = {
        "name": controller_name(spec.name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "num_cpus": 0,
        "label_selector": dict(spec.frontend.labels),
        "max_restarts": -1,
        "enable_task_events": False,  # see ray_actors
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}},
    }
    return ray.remote(Controller).options(**options).remote(spec.model_dump(mode="json"))


def state(name: str, *, address: str | None = None) -> dict[str, Any]:
    """Policy, parameters, mode, limits, timing and the newest decision.

    Raises:
        NoController: the deployment has none.
        NotRunning, NoRay, ManagerAway: see ``cluster.connection``.
    """
    with controller_of(name, address) as controller:
        return get(controller.state.remote(), ASK_S)


def set_policy(
    name: str,
    policy: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    mode: Mode | None = None,
    *,
    address: str | None = None,
) -> dict[str, Any]:
    """Decide by another policy, other parameters or in another mode; see ``Controller``."""
    with controller_of(name, address) as controller:
        return get(controller.set_policy.remote(policy, parameters, mode), ASK_S)


def try_policy(
    name: str,
    policy: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    address: str | None = None,
) -> DecisionReport:
    """What another policy would decide now; nothing is done."""
    with controller_of(name, address) as controller:
        return get(controller.try_policy.remote(policy, parameters), ASK_S)


def pause(name: str, *, address: str | None = None) -> dict[str, Any]:
    """Have the controller go on deciding, and change nothing."""
    with controller_of(name, address) as controller:
        return get(controller.pause.remote(True), ASK_S)


def resume(name: str, *, address: str | None = None) -> dict[str, Any]:
    """Have the controller act again."""
    with controller_of(name, address) as controller:
        return get(controller.pause.remote(False), ASK_S)


def decisions(
    name: str,
    *,
    since: int = 0,
    limit: int = 50,
    acted: bool = False,
    address: str | None = None,
) -> list[DecisionReport]:
    """The newest decisions, newest last; ``acted``: only those that ordered something."""
    with controller_of(name, address) as controller:
        return get(controller.decisions.remote(since, limit, acted), ASK_S)


def model(name: str, *, address: str | None = None) -> dict[str, Any] | None:
    """The calibrated model as plain data; None while there is none."""
    with controller_of(name, address) as controller:
        return get(controller.model.remote(), ASK_S)


@contextmanager
def controller_of(name: str, address: str | None = None) -> Iterator[Any]:
    """Inside, connected to the deployment; gives the Ray handle of its controller."""
    with manager_of(name, address):
        handle = companion.find(name)
        if handle is None:
            raise NoController(
                f"{name} runs without a controller; start it with one: afflux up --set "
                "autoscaler.mode=advise (or on)"
            )
        yield handle
