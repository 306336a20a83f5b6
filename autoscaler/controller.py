"""The controller: a detached Ray actor that watches, decides and orders, tick after tick.

Observe (``collect``, ``telemetry``, ``calibrate``) -> decide (``core``) -> order (``carrying``) ->
note (``journal``). All judgement is in the core; what is here only moves data. It may die at any
moment: nothing but its settings has to outlive it, and those the manager keeps. No request passes
through it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import AffluxError
from actors.metrics.exporter import Exporter, registry_page
from autoscaler import registry
from autoscaler.carrying import Orders
from autoscaler.core import Core, Mode, Situation
from autoscaler.journal import DecisionReport, Journal, describe
from autoscaler.limits import Counts
from autoscaler.observing import Observer
from autoscaler.policy import Decision
from autoscaler.predict import rebalance_gain
from autoscaler.reasons import Reason
from autoscaler.settings import make_core
from cluster import ray_actors
from cluster.manager import find_manager
from cluster.spec import ClusterSpec
from planner.control import Snapshot

logger = logging.getLogger(__name__)

ASK_S = 5.0
"""How long the manager may take to answer."""

KEY = "autoscaler"
"""Under which the manager keeps the controller's settings."""

REBALANCE_LOOK_S = 30.0
UNEVEN = 1.1
"""Imbalance below which nobody asks what a rebalance would bring."""


class Controller:
    """One deployment's. Methods are asynchronous and safe to call at any time.

    Args:
        spec: the cluster's spec as JSON data.
    """

    def __init__(self, spec: dict[str, Any]):
        self.spec = ClusterSpec.model_validate(spec)
        self.core: Core = make_core(self.spec)
        self.policy_name = self.spec.autoscaler.policy
        self.observer = Observer(self.spec)
        self.journal = Journal(self.spec.served_name)
        self.orders = Orders(self._ask)
        self._since = 0
        self._gain = 0.0
        self._looked = -REBALANCE_LOOK_S
        self._view: tuple[Snapshot, Situation] | None = None
        self._loop: asyncio.Task[None] | None = None
        self._exporter: Exporter | None = None
        if ray.is_initialized():  # also after Ray has started this process anew
            ray.get_runtime_context().current_actor.run.remote()

    # -- the loop --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Begin; asked again, nothing happens."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self._resume()
        self._expose()
        while True:
            began = time.monotonic()
            try:
                await self._tick(began)
            except Exception:  # one bad tick must not be the last
                logger.exception("a tick of the controller failed")
            left = self.core.timing.interval - (time.monotonic() - began)
            await asyncio.sleep(max(0.05, left))

    async def _resume(self) -> None:
        """Go on with what the one before was set to."""
        while True:
            try:
                kept = await self._ask("kept", KEY)
                break
            except AffluxError as error:
                logger.warning("waiting for the manager: %s", error)
                await asyncio.sleep(1.0)
        if kept:
            try:
                self._adopt(kept["policy"], kept["parameters"], kept["mode"])
                self.core.paused = kept["paused"]
            except AffluxError as error:
                logger.error("going on with the spec's policy: %s", error)
        # A change that the one before had just made still has its cool-down.
        self.core.rest(time.monotonic())

    def _expose(self) -> None:
        if not self.spec.metrics.enabled:
            return
        pages = {"/metrics": registry_page(self.journal.families.registry)}
        try:
            self._exporter = Exporter(self.spec.metrics.host, 0, pages)
        except AffluxError as error:
            logger.error("the controller has no metrics: %s", error)

    async def _tick(self, now: float) -> None:
        try:
            facts = await self._ask("situation", self._since, self._address())
        except AffluxError as error:
            nobody = Counts(0, 0)
            blind = Decision(now, nobody, None, nobody, None, (Reason.MANAGER_AWAY,), str(error))
            self._note(blind, None, now)
            return
        for decision, report in self.orders.ended(facts["ended"], now):
            self._note_end(decision, report)
        self._since = max([self._since, *(report.number for report in facts["ended"])])
        snapshot = await self.observer.look(facts, now)
        self.core.system = self.observer.system()
        situation = Situation(
            changing=_words(facts["change"]),
            cannot_place=self.orders.cannot_place(now),
            rebalance_gain=await self._rebalance_gain(facts, snapshot, now),
        )
        self._view = (snapshot, situation)
        decision = self.core.tick(snapshot, self.observer.model, situation, time.time())
        report = self._note(decision, snapshot, now)
        if decision.target is not None:
            await self._order(decision, report, facts, now)
        elif decision.rebalance:
            await self._rebalance(report)

    async def _order(
        self, decision: Decision, report: DecisionReport, facts: Mapping[str, Any], now: float
    ) -> None:
        try:
            placed = await self.orders.place(decision, facts["members"], now)
        except AffluxError as error:
            self.core.undone(decision)
            report.outcome = f"refused: {error}"
        else:
            report.outcome = placed.error
            report.change = placed.numbers[0] if placed.numbers else None
            if not placed.numbers:
                self.core.undone(decision)
        if report.outcome:
            logger.warning("%s -> %s: %s", report.there, report.target, report.outcome)

    async def _rebalance(self, report: DecisionReport) -> None:
        try:
            report.change = (await self._ask("rebalance")).number
        except AffluxError as error:
            report.outcome = f"refused: {error}"

    def _note_end(self, decision: Decision, ended: Any) -> None:
        if ended.phase == "rolled_back":
            self.core.undone(decision)
        for report in reversed(self.journal.reports):
            if report.change == ended.number:
                report.outcome = ended.phase + (f": {ended.error}" if ended.error else "")
                return

    def _note(self, decision: Decision, snapshot: Snapshot | None, began: float) -> DecisionReport:
        return self.journal.note(
            decision,
            snapshot,
            self.observer.model,
            policy=self.policy_name,
            mode="paused" if self.core.paused else self.core.mode,
            wall=time.time(),
            seconds=time.monotonic() - began,
        )

    async def _rebalance_gain(
        self, facts: Mapping[str, Any], snapshot: Snapshot, now: float
    ) -> float:
        """Share of a step that a new placement would save; looked up now and then."""
        model, uneven = self.observer.model, facts["imbalance"]
        if model is None or not model.reliable or not uneven > UNEVEN:
            self._gain = 0.0
        elif now - self._looked > REBALANCE_LOOK_S:
            self._looked = now
            with suppress(AffluxError):
                after = await self._ask("rebalanced")
                self._gain = rebalance_gain(model, self.core.system, snapshot, uneven, after)
        return self._gain

    # -- what others tell and ask ----------------------------------------------------------------

    async def take_requests(self, frontend: str, batch: dict[str, Any]) -> None:
        """A frontend's requests since its last word; see ``cluster.request_log``."""
        self.observer.take_requests(frontend, batch)

    async def state(self) -> dict[str, Any]:
        """Policy, parameters, mode, limits, timing, and the newest decision, as plain data."""
        reports = self.journal.since(0, 1)
        return {
            "policy": self.policy_name,
            "parameters": _parameters(self.core),
            "mode": self.core.mode,
            "paused": self.core.paused,
            "limits": vars(self.core.limits),
            "timing": vars(self.core.timing),
            "slo": vars(self.core.slo),
            "last": reports[-1].model_dump(mode="json") if reports else None,
            "pid": os.getpid(),
        }

    async def decisions(
        self, since: int = 0, limit: int = 50, acted: bool = False
    ) -> list[DecisionReport]:
        """Reports above ``since``, newest last; ``acted``: only those that ordered something."""
        found = [r for r in self.journal.since(since) if r.acted or not acted]
        return found[-limit:]

    async def model(self) -> dict[str, Any] | None:
        """The calibrated model as plain data; None while there is none."""
        return describe(self.observer.model)

    async def set_policy(
        self,
        policy: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        mode: Mode | None = None,
    ) -> dict[str, Any]:
        """Decide by another policy, other parameters or in another mode from the next tick on.

        Args:
            policy: a name; None keeps the policy.
            parameters: all of them that differ from the policy's defaults; None keeps them, or
                takes the spec's, where the policy is another.
            mode: None keeps it.

        Returns:
            ``state()``.

        Raises:
            BadPolicy: nothing has changed.
        """
        name = self.policy_name if policy is None else policy
        if parameters is None and name == self.policy_name:
            parameters = _parameters(self.core)
        self._adopt(name, parameters, self.core.mode if mode is None else mode)
        await self._keep()
        return await self.state()

    async def try_policy(
        self, policy: str, parameters: Mapping[str, Any] | None = None
    ) -> DecisionReport:
        """What another policy would decide on what was seen last; nothing is done.

        Raises:
            BadPolicy; AffluxError with code ``not_ready`` before the first tick.
        """
        if self._view is None:
            raise AffluxError("the controller has not seen anything yet", code="not_ready")
        core = make_core(self.spec, policy, parameters, "advise")
        core.system = self.core.system
        snapshot, situation = self._view
        decision = core.tick(snapshot, self.observer.model, situation, time.time())
        trial = Journal(self.spec.served_name)
        return trial.note(
            decision,
            snapshot,
            self.observer.model,
            policy=policy,
            mode="try",
            wall=time.time(),
            seconds=0.0,
        )

    async def pause(self, paused: bool = True) -> dict[str, Any]:
        """Go on deciding and change nothing, or go on acting; returns ``state()``."""
        self.core.paused = paused
        await self._keep()
        return await self.state()

    # -- small things ----------------------------------------------------------------------------

    def _adopt(self, policy: str, parameters: Mapping[str, Any] | None, mode: Mode) -> None:
        made = make_core(self.spec, policy, parameters, mode)
        self.core.policy, self.core.mode = made.policy, mode
        self.policy_name = policy

    async def _keep(self) -> None:
        settings = {
            "policy": self.policy_name,
            "parameters": _parameters(self.core),
            "mode": self.core.mode,
            "paused": self.core.paused,
        }
        await self._ask("keep", KEY, settings)

    def _address(self) -> dict[str, str] | None:
        if self._exporter is None:
            return None
        return {"metrics": self._exporter.address, "node_ip": ray_actors.node_ip()}

    async def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the manager.

        Raises:
            AffluxError: what the manager raised; code ``manager_away`` when it does not answer.
        """
        manager = await asyncio.to_thread(find_manager, self.spec.name)
        if manager is None:
            raise AffluxError(f"{self.spec.name} has no manager", code="manager_away")
        try:
            async with asyncio.timeout(ASK_S):
                return await getattr(manager, method).remote(*args, **options)
        except TimeoutError:
            raise AffluxError(
                f"the manager did not answer within {ASK_S:g} s", code="manager_away"
            ) from None
        except RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, AffluxError):
                raise cause from None
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise AffluxError(
                f"the manager does not answer: {first}", code="manager_away"
            ) from None


def _parameters(core: Core) -> dict[str, Any]:
    checked = getattr(core.policy, "parameters", None)
    if isinstance(checked, registry.Parameters):
        return checked.model_dump(mode="json", exclude_defaults=True)
    return {}


def _words(change: Any) -> str:
    return "" if change is None else f"change {change.number} ({change.verb} {change.text})"
