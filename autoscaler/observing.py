"""What the controller sees: asks the actors, keeps the windows, has the model refitted.

Between the raw answers (``collect``, the frontends' reports) and the core, which wants a snapshot
and a model. Not for deciding anything.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from actors.errors import AffluxError
from autoscaler.calibrate import Calibrator
from autoscaler.collect import Cursors, collect
from autoscaler.model import Model
from autoscaler.policy import System
from autoscaler.priors import prior_of
from autoscaler.settings import slo_of, system_of
from autoscaler.telemetry import Telemetry
from cluster import preflight
from cluster.manager import find_manager
from cluster.spec import ClusterSpec
from planner.control import Snapshot

logger = logging.getLogger(__name__)

REFIT_S = 5.0


class Observer:
    """Belongs to one event loop.

    Args:
        spec: the deployment's.

    Attributes:
        model: the newest fit; None while there is none.
    """

    def __init__(self, spec: ClusterSpec):
        self.spec = spec
        self.model: Model | None = None
        self._telemetry = Telemetry(spec.autoscaler.window_s, slo_of(spec))
        self._cursors = Cursors()
        self._calibrator: Calibrator | None = None
        self._system = system_of(spec)
        self._known: tuple[Any, ...] = ()
        self._fitted = -math.inf

    async def look(self, facts: Mapping[str, Any], now: float) -> Snapshot:
        """One round of questions, and what it comes to.

        Args:
            facts: the manager's ``situation``. now: monotonic seconds.
        """
        if self._calibrator is None:
            await asyncio.to_thread(self._prepare)
        telemetry = self._telemetry
        telemetry.members(facts["members"], now)
        manager = await asyncio.to_thread(find_manager, self.spec.name)
        batches = await collect(manager, self._cursors)
        now = time.monotonic()
        serving = sorted(m for m in facts["members"] if m[2] == "ready")
        known = (serving, facts["epoch"])
        if known != self._known:
            telemetry.changed(now)
            self._known = known
        for name, batch in batches.items():
            telemetry.take(name, batch, now)
            self._calibrate(name, batch, now)
        snapshot = telemetry.snapshot(now)
        if math.isfinite(facts["imbalance"]):
            snapshot = dataclasses.replace(snapshot, imbalance=facts["imbalance"])
        self._refit(snapshot, now)
        return snapshot

    def take_requests(self, frontend: str, batch: Mapping[str, Any]) -> None:
        """A frontend's report."""
        now = time.monotonic()
        self._telemetry.take(frontend, batch, now)
        self._calibrate(frontend, batch, now)

    def system(self) -> System:
        """What does not change, with the actors' own word where they have given it."""
        found = self._telemetry.facts()
        return dataclasses.replace(
            self._system,
            slots=found.get("slots") or self._system.slots,
            kv_tokens=found.get("kv_tokens") or self._system.kv_tokens,
        )

    def _prepare(self) -> None:
        """Read the checkpoint's shape; off the event loop."""
        checkpoint = preflight.check_model(self.spec)
        top_k = checkpoint.top_k
        self._system = system_of(self.spec, top_k, checkpoint.num_experts)
        self._calibrator = Calibrator(
            layers=len(checkpoint.moe_layers),
            top_k=top_k,
            prior=prior_of(self.spec, checkpoint),
        )

    def _calibrate(self, name: str, batch: Mapping[str, Any], now: float) -> None:
        if self._calibrator is not None:
            self._calibrator.take(name, batch, now)

    def _refit(self, snapshot: Snapshot, now: float) -> None:
        if self._calibrator is None or now - self._fitted < REFIT_S:
            return
        self._fitted = now
        try:
            self.model = self._calibrator.model(snapshot, self.system(), now)
        except AffluxError as error:
            logger.warning("the latency model could not be fitted: %s", error)
