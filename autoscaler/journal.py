"""What the controller did, tick by tick: reports for people, JSON lines for logs, metrics.

Keeps the last decisions and counts all of them. Not for deciding anything, nor for Grafana: its
annotations are made from the same reports (``dashboards.annotate``).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.metrics.families import Families
from autoscaler.limits import Counts
from autoscaler.model import Model
from autoscaler.policy import Decision
from autoscaler.reasons import Reason
from planner.control import Snapshot

logger = logging.getLogger("afflux.controller")

KEPT = 2000
"""Reports that are kept; an hour of ticks of two seconds."""


class DecisionReport(BaseModel):
    """One tick, as ``afflux policy log --json`` prints it.

    ``time`` is Unix time; counts read ``3A5F``. ``observed`` holds what the decision rests on, in
    seconds and requests per second; what was not measured is left out. ``change`` is the number of
    the change that was ordered, ``outcome`` what became of it.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    time: float
    policy: str
    mode: str
    there: str
    proposed: str | None
    advised: str
    target: str | None
    reasons: tuple[Reason, ...]
    detail: str = ""
    rebalance: bool = False
    observed: dict[str, float] = {}
    change: int | None = None
    outcome: str = ""

    @property
    def acted(self) -> bool:
        """Whether something was ordered."""
        return self.target is not None or self.rebalance


class Journal:
    """Takes note of decisions; metrics on the side ``controller`` of the catalogue.

    Args:
        model_name: label of every series.

    Attributes:
        families: holds the registry to be exported.
        reports: the newest ``KEPT``, newest last.
    """

    def __init__(self, model_name: str):
        self.reports: deque[DecisionReport] = deque(maxlen=KEPT)
        self._number = 0
        self.families = families = Families("controller", {"model_name": model_name})
        decisions = families["afd_controller_decisions_total"]
        self._decisions = {reason: decisions.labels(reason.value) for reason in Reason}
        advised = families["afd_controller_advised_actors"]
        self._advised = {role: advised.labels(role) for role in ("attention", "ffn")}
        self._ratio = families["afd_controller_advised_ratio"]
        self._tick = families["afd_controller_last_tick_timestamp_seconds"]
        self._duration = families["afd_controller_tick_seconds"]
        self._age = families["afd_controller_telemetry_age_seconds"]
        self._error = families["afd_controller_model_error_ratio"]
        self._reliable = families["afd_controller_model_reliable"]
        self._acting = families["afd_controller_acting"]

    def note(
        self,
        decision: Decision,
        snapshot: Snapshot | None,
        model: Model | None,
        *,
        policy: str,
        mode: str,
        wall: float,
        seconds: float,
    ) -> DecisionReport:
        """Take in a tick that ended now.

        Args:
            wall: Unix time. seconds: that the tick took.
        """
        self._number += 1
        report = DecisionReport(
            number=self._number,
            time=wall,
            policy=policy,
            mode=mode,
            there=str(decision.there),
            proposed=_proposed(decision),
            advised=str(decision.advised),
            target=None if decision.target is None else str(decision.target),
            reasons=decision.reasons,
            detail=decision.detail,
            rebalance=decision.rebalance,
            observed={} if snapshot is None else observed(snapshot),
        )
        self.reports.append(report)
        self._count(report, decision.advised, snapshot, model, seconds)
        level = logging.INFO if report.acted else logging.DEBUG
        logger.log(level, "%s", report.model_dump_json())
        return report

    def _count(
        self,
        report: DecisionReport,
        advised: Counts,
        snapshot: Snapshot | None,
        model: Model | None,
        seconds: float,
    ) -> None:
        for reason in report.reasons:
            self._decisions[reason].inc()
        for role, count in asdict_counts(advised).items():
            self._advised[role].set(count)
        if advised.ffn:
            self._ratio.set(advised.attention / advised.ffn)
        self._tick.set(report.time)
        self._duration.observe(seconds)
        if snapshot is not None and math.isfinite(snapshot.age):
            self._age.set(snapshot.age)
        if model is not None:
            self._reliable.set(model.reliable)
            if math.isfinite(model.error):
                self._error.set(model.error)
        self._acting.set(report.mode == "on")

    def since(self, number: int, limit: int = KEPT) -> list[DecisionReport]:
        """Reports above ``number``, the newest ``limit`` of them, newest last."""
        return [report for report in self.reports if report.number > number][-limit:]


def observed(snapshot: Snapshot) -> dict[str, float]:
    """What a decision rests on, without what was not measured."""
    values: dict[str, float] = {
        "window_s": snapshot.window,
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "rate": snapshot.arrival_rate,
        "tokens_rate": snapshot.tokens_rate,
        "completed": snapshot.completed,
        "rejected": snapshot.rejected,
        "ttft_p90_s": snapshot.ttft.p90,
        "tpot_p90_s": snapshot.tpot.p90,
        "attention_busy": snapshot.attention_busy,
        "ffn_busy": snapshot.ffn_busy,
        "batch": snapshot.batch,
        "kv_tokens": snapshot.kv_tokens,
        "kv_usage": snapshot.kv_usage,
        "theta": snapshot.theta,
        "imbalance": snapshot.imbalance,
        "age_s": snapshot.age,
    }
    return {key: round(float(v), 6) for key, v in values.items() if math.isfinite(v)}


def asdict_counts(counts: Counts) -> dict[str, int]:
    """Workers by role."""
    return {"attention": counts.attention, "ffn": counts.ffn}


def describe(model: Model | None) -> dict[str, Any] | None:
    """A model as plain data that JSON can hold."""
    if model is None:
        return None
    import json

    data = {key: value for key, value in asdict(model).items() if key != "latencies"}
    data["latencies"] = json.loads(model.latencies.to_json())
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data.items()
    }


def _proposed(decision: Decision) -> str | None:
    if decision.proposed is None:
        return None
    attention, ffn = decision.proposed.attention, decision.proposed.ffn
    there = decision.there
    return str(
        Counts(
            there.attention if attention is None else attention, there.ffn if ffn is None else ffn
        )
    )
