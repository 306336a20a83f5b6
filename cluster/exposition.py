"""The manager's side of metrics: its own page, and the list of everybody else's.

One HTTP server with ``/metrics`` and ``/sd``. Pages are read on threads, the deployment changes on
the manager's event loop, so a page only shows what ``show`` has put there last. Not for what is
measured (``control_metrics``) or how a list looks (``discovery``).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping

from actors.metrics.exporter import Exporter, json_page, registry_page
from cluster.control_metrics import ControlMetrics
from cluster.discovery import Frontends, Targets, announced, groups
from cluster.membership import Membership
from cluster.seats import Seat
from cluster.slowness import Slowness
from cluster.spec import ClusterSpec
from cluster.status import Health

logger = logging.getLogger(__name__)


class Exposition:
    """What can be read about a deployment by HTTP; nothing while metrics are off or not open.

    Args:
        spec: the deployment's.

    Attributes:
        ray_agents: where Ray's nodes serve their metrics, "host:port".
    """

    def __init__(self, spec: ClusterSpec):
        self.spec = spec
        self.metrics = ControlMetrics(spec)
        self.ray_agents: tuple[str, ...] = ()
        self._frontends = Frontends()
        self._controllers = Frontends()  # one, and after a restart for a moment two
        self._targets = Targets()
        self._exporter: Exporter | None = None
        self._node_ip: str | None = None
        self._warned = False

    def open(self, node_ip: str | None, port: int | None = None) -> None:
        """Start to serve.

        Args:
            node_ip: address of this machine, for others.
            port: the one that an earlier manager had; None takes the spec's.

        Raises:
            AffluxError: code ``bad_metrics_address``.
        """
        settings = self.spec.metrics
        if not settings.enabled or self._exporter is not None:
            return
        pages = {
            "/metrics": registry_page(self.metrics.families.registry),
            "/sd": json_page(lambda: groups(self.spec.name, self._targets)),
        }
        self._exporter = Exporter(settings.host, port or settings.port, pages)
        self._node_ip = node_ip

    @property
    def address(self) -> str | None:
        """Where others reach it, "host:port"; None while closed."""
        return announced(self._exporter.address, self._node_ip) if self._exporter else None

    @property
    def url(self) -> str | None:
        """The same as a URL without a path."""
        return f"http://{self.address}" if self.address else None

    @property
    def port(self) -> int | None:
        """The port that it listens on."""
        return self._exporter.port if self._exporter else None

    def hear(self, frontend: Mapping[str, str]) -> None:
        """A frontend told its ``name``, its ``node_ip`` and where its ``metrics`` are bound."""
        address = self._announced(frontend["metrics"], frontend["node_ip"])
        self._frontends.hear(frontend["name"], address, time.monotonic())

    def hear_controller(self, controller: Mapping[str, str]) -> None:
        """The controller told its ``node_ip`` and where its ``metrics`` are bound."""
        address = self._announced(controller["metrics"], controller["node_ip"])
        self._controllers.hear("controller", address, time.monotonic())

    def show(
        self,
        core: Membership | None,
        seats: Collection[Seat],
        health: Health,
        warm: int,
        slowness: Slowness,
    ) -> None:
        """Have the pages show the deployment as it is now; arguments as ``ControlMetrics.look``."""
        self.metrics.look(core, seats, health, warm, slowness)
        found = [self._announced(*bound) for seat in seats if (bound := _bound(seat))]
        processes = [address for address in found if address is not None]
        if self.address is not None:
            processes.append(self.address)
        processes += self._controllers.live(time.monotonic())
        self._targets = Targets(
            tuple(processes), self._frontends.live(time.monotonic()), self.ray_agents
        )

    def close(self) -> None:
        """Stop serving; idempotent. May wait for a scrape that is under way."""
        exporter, self._exporter = self._exporter, None
        if exporter is not None:
            exporter.close()

    def _announced(self, address: str, node_ip: str | None) -> str | None:
        reached = announced(address, node_ip, self._node_ip)
        if reached is None and not self._warned:
            self._warned = True
            logger.warning(
                "metrics on other nodes than the manager's can't be read: they listen on %s; set "
                "metrics.host to 0.0.0.0",
                self.spec.metrics.host,
            )
        return reached


def _bound(seat: Seat) -> tuple[str, str | None] | None:
    """Where a live actor serves its metrics, and its node's address."""
    address = (seat.info or {}).get("metrics")
    if seat.handle is None or seat.state == "failed" or not address:
        return None
    return address, seat.node_ip
