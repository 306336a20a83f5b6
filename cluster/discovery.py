"""Who can be scraped: the facts as Prometheus HTTP service discovery wants them. Pure.

Ports are free ones and actors come and go, so no list of targets could be written down: Prometheus
asks the manager instead. Not for serving the answer (``exposition``), nor for what a target shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

FRONTEND_SILENCE_S = 15.0
"""Seconds without a word after which a frontend is taken off the list. It asks the manager for the
members more often than that."""

VLLM_PATH = "/vllm/metrics"
"""Where a frontend serves vLLM's own metrics."""

_EVERYWHERE = ("0.0.0.0", "[::]")
_LOOPBACK = ("127.", "localhost", "[::1]")


@dataclass(frozen=True)
class Targets:
    """Addresses, each "host:port".

    Args:
        processes: the manager's and the actors'.
        frontends: they have a page of vLLM's metrics as well.
        ray: Ray's node agents.
    """

    processes: tuple[str, ...] = ()
    frontends: tuple[str, ...] = ()
    ray: tuple[str, ...] = ()


def groups(deployment: str, targets: Targets) -> list[dict[str, Any]]:
    """The answer to Prometheus: target groups with the labels of their series.

    Labels that tell actors apart are on the series already, so that a target has only those that
    tell jobs and deployments apart. A group without targets is left out.
    """
    ours = {"job": "afflux", "deployment": deployment}
    vllm = {"job": "vllm", "deployment": deployment, "__metrics_path__": VLLM_PATH}
    found = [
        _group((*targets.processes, *targets.frontends), ours),
        _group(targets.frontends, vllm),
        _group(targets.ray, {"job": "ray"}),
    ]
    return [group for group in found if group["targets"]]


def announced(address: str, node_ip: str | None, here: str | None = None) -> str | None:
    """Where a Prometheus reaches an exporter; None when it can't.

    One that is bound to every interface is at its node's address. One that is bound to the loopback
    interface can be reached on its own node only.

    Args:
        address: "host:port" as bound.
        node_ip: of the exporter's node; None when it is not known.
        here: of the manager's node, where Prometheus is expected; None takes any node for it.
    """
    host, _, port = address.rpartition(":")
    if host in _EVERYWHERE and node_ip:
        return f"[{node_ip}]:{port}" if ":" in node_ip else f"{node_ip}:{port}"
    if host.startswith(_LOOPBACK) and node_ip and here and node_ip != here:
        return None
    return address


class Frontends:
    """The frontends that have told of themselves lately.

    Nobody starts or ends them here (Ray Serve does), so a silent one counts as gone.
    """

    def __init__(self) -> None:
        self._heard: dict[str, tuple[str, float]] = {}

    def hear(self, name: str, address: str | None, now: float) -> None:
        """A frontend lives and can be scraped at ``address``, or can't.

        Args:
            now: seconds of a monotonic clock, as below.
        """
        if address is None:
            self._heard.pop(name, None)
        else:
            self._heard[name] = (address, now)

    def live(self, now: float) -> tuple[str, ...]:
        """Addresses of those that are not silent; the others are forgotten."""
        self._heard = {
            name: (address, at)
            for name, (address, at) in self._heard.items()
            if now - at <= FRONTEND_SILENCE_S
        }
        return tuple(address for address, _ in self._heard.values())


def _group(addresses: Iterable[str], labels: dict[str, str]) -> dict[str, Any]:
    return {"targets": sorted(set(addresses)), "labels": labels}
