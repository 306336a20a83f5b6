"""The deployment's controller as the manager knows it: something to start, find and end.

What it decides is ``autoscaler``'s business, which stands above this package; so it is named here
and imported only when a spec asks for it. Not for talking to it: see ``autoscaler.launch``.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import AffluxError
from cluster.names import NAMESPACE, controller_name
from cluster.ray_actors import kill
from cluster.spec import ClusterSpec

logger = logging.getLogger(__name__)

STARTER = "autoscaler.launch"
"""Module whose ``start(spec)`` starts a controller, or finds the one that there is."""

CHECKER = "autoscaler.settings"
"""Module whose ``check(spec)`` refuses an autoscaler section that can't work."""


def check(spec: ClusterSpec) -> None:
    """Refuse an autoscaler section that can't work.

    Raises:
        AffluxError: bad limits, an unknown policy, or bad parameters; the text says which.
    """
    if spec.autoscaler.mode != "off":
        importlib.import_module(CHECKER).check(spec)


def start(spec: ClusterSpec) -> Any | None:
    """The controller's Ray handle, started if need be; None when the spec wants none.

    A controller that can't be started is logged and left out: serving does not need it.
    """
    if spec.autoscaler.mode == "off":
        return None
    try:
        return importlib.import_module(STARTER).start(spec)
    except (AffluxError, RayError, ImportError) as error:
        logger.error("%s serves without a controller: %s", spec.name, error)
        return None


def find(deployment: str) -> Any | None:
    """The Ray handle of a deployment's controller, or None."""
    if not ray.is_initialized():  # or asking would start a Ray of our own
        return None
    try:
        return ray.get_actor(controller_name(deployment), namespace=NAMESPACE)
    except ValueError:
        return None


def end(deployment: str) -> None:
    """End a deployment's controller, if there is one."""
    handle = find(deployment)
    if handle is not None:
        kill(handle)
