"""Records a running deployment: asks its actors, hears its frontends, writes what they tell.

For ``afflux telemetry record``. Serving and the controller go on as they are; nothing that happened
before the recording began is in it. Not for the file's format: see ``recording``.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.errors import AffluxError
from actors.telemetry import STEP_COLUMNS
from autoscaler.collect import DEADLINE_S, Cursors, collect
from autoscaler.recording import Header, Recorder
from cluster.request_log import Done
from cluster.spec import ClusterSpec

EVERY_S = 1.0
LISTEN_S = 5.0
"""Seconds between two requests to be told of requests; the manager forgets who does not ask."""

_KEPT = 600
_AT = STEP_COLUMNS.index("at")


@dataclass
class Progress:
    """How far a recording is.

    Args:
        seconds: since it began.
        actors: that answered in the last round. silent: why others did not.
        steps, rides, requests: recorded so far; requests that ended.
        changes, decisions: recorded so far.
        missed: records that were written over before they were read.
        away: the manager does not answer.
    """

    seconds: float = 0.0
    actors: int = 0
    silent: Mapping[str, str] | None = None
    steps: int = 0
    rides: int = 0
    requests: int = 0
    changes: int = 0
    decisions: int = 0
    missed: int = 0
    away: bool = False


class Inbox:
    """A Ray actor that takes the frontends' reports until somebody fetches them."""

    def __init__(self) -> None:
        self._reports: deque[tuple[str, dict[str, Any]]] = deque(maxlen=_KEPT)

    async def take_requests(self, frontend: str, batch: dict[str, Any]) -> None:
        """A frontend's report."""
        self._reports.append((frontend, batch))

    async def fetch(self) -> list[tuple[str, dict[str, Any]]]:
        """All reports since the last time."""
        found = list(self._reports)
        self._reports.clear()
        return found


class Session:
    """One recording of one deployment.

    Args:
        manager: its Ray handle.
        recorder: where to.
        controller: Ray handle of its controller, or None.
        inbox: Ray handle of an ``Inbox`` that belongs to this session.
    """

    def __init__(self, manager: Any, recorder: Recorder, controller: Any, inbox: Any):
        self.progress = Progress()
        self._manager = manager
        self._recorder = recorder
        self._controller = controller
        self._inbox = inbox
        self._name = f"recording-{uuid.uuid4().hex[:8]}"
        self._cursors = Cursors()
        self._began = time.time()
        self._started = time.monotonic()
        self._asked = -LISTEN_S
        self._rides: dict[tuple[str, str], int] = {}
        self._heard: set[tuple[str, str]] = set()
        self._change: int | None = None
        self._decision: int | None = None

    async def run(self, seconds: float, on_round: Callable[[Progress], None] | None = None) -> None:
        """Record for so long; ``on_round`` is told how far it is. May be cancelled."""
        try:
            while (left := seconds - (time.monotonic() - self._started)) > 0:
                began = time.monotonic()
                await self.round()
                if on_round is not None:
                    on_round(self.progress)
                pause = EVERY_S - (time.monotonic() - began)
                await asyncio.sleep(max(0.0, min(pause, left)))
            await self.round()
            if on_round is not None:
                on_round(self.progress)
        finally:
            await _quietly(self._manager.unlisten.remote(self._name))

    async def round(self) -> None:
        """Ask everybody once, and write what they say."""
        now = time.monotonic()
        if now - self._asked >= LISTEN_S:
            self._asked = now
            await _quietly(self._manager.listen.remote(self._name, self._inbox))
        batches = await collect(self._manager, self._cursors)
        for name, batch in sorted(batches.items()):
            self._write(name, batch)
        for name, batch in await _quietly(self._inbox.fetch.remote()) or ():
            self._write(name, batch)
        await self._write_changes()
        await self._write_decisions()
        progress = self.progress
        progress.seconds = time.monotonic() - self._started
        progress.actors, progress.silent = len(batches), dict(self._cursors.silent)
        progress.away = self._cursors.away

    def _write(self, name: str, batch: dict[str, Any]) -> None:
        """Write what was told, less what happened before."""
        since = self._began - batch["unix"] + batch["clock"]  # on the sender's clock
        progress = self.progress
        match batch["role"]:
            case "attention":
                steps = batch["steps"]
                batch = {**batch, "steps": steps[steps[:, _AT] > since]}
                progress.steps += len(batch["steps"])
            case "ffn":
                key = name, batch["incarnation"]
                rides = batch.get("rides", 0)
                progress.rides += rides - self._rides.setdefault(key, rides)
                self._rides[key] = rides
            case "frontend":
                events = [record for record in batch["events"] if record.at > since]
                batch = {**batch, "events": events}
                progress.requests += sum(isinstance(record, Done) for record in events)
        if (name, batch["incarnation"]) not in self._heard:
            self._heard.add((name, batch["incarnation"]))
            batch = {**batch, "missed": 0}  # of what was before
        progress.missed += batch["missed"]
        self._recorder.batch(name, batch)

    async def _write_changes(self) -> None:
        reports = await _quietly(self._manager.history.remote(50))
        if reports is None:
            return
        ended = [report for report in reports if report.ended]
        newest = max((report.number for report in ended), default=0)
        if self._change is None or newest < self._change:  # the first, or the manager counts anew
            self._change = newest
        for report in ended:
            if report.number > self._change and report.phase != "noop":
                at = report.started_at + report.seconds.get("total", 0.0)
                self._recorder.change(at, report.model_dump(mode="json"))
                self.progress.changes += 1
        self._change = newest

    async def _write_decisions(self) -> None:
        if self._controller is None:
            return
        since = self._decision or 0
        reports = await _quietly(self._controller.decisions.remote(since, 1000)) or []
        for report in reports:
            if report.time > self._began:
                self._recorder.decision(report.time, report.model_dump(mode="json"))
                self.progress.decisions += 1
        if reports:
            self._decision = reports[-1].number


async def record(
    manager: Any,
    recorder: Recorder,
    seconds: float,
    *,
    controller: Any = None,
    on_round: Callable[[Progress], None] | None = None,
) -> Progress:
    """Record a deployment for so long; a cancelled recording is whole up to then.

    Args:
        manager: its Ray handle. This process is connected to its Ray cluster.
        recorder: where to.
        seconds: how long.
        controller: Ray handle of its controller, whose decisions are recorded too.
        on_round: told how far it is, about once a second.
    """
    inbox = ray.remote(Inbox).options(num_cpus=0).remote()
    session = Session(manager, recorder, controller, inbox)
    await session.run(seconds, on_round)
    return session.progress


def header_of(spec: ClusterSpec, actors: Mapping[str, Any]) -> Header:
    """The header for a deployment.

    Args:
        spec: the deployment's.
        actors: a round of ``collect``, for what the actors know; may be empty.
    """
    told = [batch for batch in actors.values() if batch["role"] == "attention" and batch["slots"]]
    return Header(
        model=spec.served_name,
        began=time.time(),
        ttft_s=spec.slo.ttft_s,
        tpot_s=spec.slo.tpot_s,
        percentile=spec.slo.percentile,
        lanes=spec.lanes,
        layers=max((batch["layer_count"] for batch in told), default=None) or None,
        slots=min((batch["slots"] for batch in told), default=None),
        kv_tokens=min((batch["kv_tokens"] for batch in told), default=None),
        attention=sum(batch["role"] == "attention" for batch in actors.values()),
        ffn=sum(batch["role"] == "ffn" for batch in actors.values()),
        emulated=spec.emulate is not None,
        **_shape(spec),
    )


def _shape(spec: ClusterSpec) -> dict[str, int]:
    """Experts of a layer and of a token, where this machine has the checkpoint."""
    from cluster.preflight import check_model

    try:
        checkpoint = check_model(spec)
    except AffluxError:
        return {}
    return {"top_k": checkpoint.top_k, "experts": checkpoint.num_experts}


async def _quietly(call: Any) -> Any:
    """What a call gives; None when it fails or takes too long."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await call
    except (RayError, AffluxError, TimeoutError):
        return None
