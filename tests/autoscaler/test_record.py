"""Recording a deployment without Ray: what comes from before, late, twice, or from nobody."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError

from autoscaler.journal import DecisionReport
from autoscaler.record import Inbox, Progress, Session, header_of
from autoscaler.recording import Header, Recorder, entries
from autoscaler.summary import summarise
from cluster.request_log import First
from cluster.spec import ClusterSpec
from cluster.status import ChangeReport
from tests.autoscaler.test_recording import done
from tests.autoscaler.told import AHEAD, attention, ffn, frontend, row


class Handle:
    """A Ray handle whose methods are given: values, errors, or functions."""

    def __init__(self, **methods: Any):
        self.methods = methods
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        outer = self

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                outer.asked.append(name)
                return outer._call(outer.methods[name], *args)

        return Method

    async def _call(self, answer: Any, *args: Any) -> Any:
        if isinstance(answer, Exception):
            raise answer
        found = answer(*args) if callable(answer) else answer
        return await found if asyncio.iscoroutine(found) else found


def change(number: int, phase: str = "done") -> ChangeReport:
    return ChangeReport(
        number=number,
        verb="scale",
        text="attention 1 -> 2",
        phase=phase,  # type: ignore[arg-type]
        started_at=10.0,
        seconds={"total": 2.0},
    )


def decision(number: int, at: float) -> DecisionReport:
    return DecisionReport(
        number=number,
        time=at,
        policy="static",
        mode="on",
        there="1A1F",
        proposed=None,
        advised="1A1F",
        target=None,
        reasons=(),
    )


class Deployment:
    """One of each role; time is ours, and ``now`` says when the next answers are from."""

    def __init__(self, path: Path):
        self.now = time.time()
        self.rides = 100
        self.rows: list[list[float]] = []
        self.changes = [change(1)]
        self.decisions = [decision(1, self.now - 100)]
        self.inbox = Inbox()
        workers = {
            "attention-0": ("attention", Handle(telemetry=self.steps), "ready"),
            "ffn-0": (
                "ffn",
                Handle(telemetry=lambda since: ffn(self.now, self.rides, 1.0)),
                "ready",
            ),
            "ffn-1": ("ffn", Handle(telemetry=RayActorError()), "ready"),
        }
        self.manager = Handle(
            workers=workers,
            listen=None,
            unlisten=None,
            history=lambda limit: self.changes,
        )
        self.controller = Handle(decisions=lambda since, limit: self.decisions)
        self.recorder = Recorder(path, Header(model="tiny", began=self.now))
        box = Handle(fetch=self.inbox.fetch)
        self.session = Session(self.manager, self.recorder, self.controller, box)

    def totals(self, since: int) -> dict[str, Any]:
        return ffn(self.now, self.rides, 1.0)

    def steps(self, since: int) -> dict[str, Any]:
        return attention(self.now, self.rows, number=len(self.rows), missed=5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "day.jsonl"


async def test_what_happened_before_is_left_out(path: Path) -> None:
    there = Deployment(path)
    before, after = there.now - 5.0, there.now + 0.9
    there.rows = [row(before)]
    old = [First(1, before + AHEAD, 0.1, 5, 0), done(2, before - 1.0)]
    await there.inbox.take_requests("frontend-0", frontend(there.now, old))
    await there.session.round()
    there.now += 1.0
    there.rows += [row(after)]
    there.rides = 130
    there.changes += [change(2), change(3, "prepare"), change(4, "noop")]
    there.decisions = [decision(2, after)]
    await there.inbox.take_requests("frontend-0", frontend(there.now, [done(3, after - 0.5)]))
    await there.session.round()
    progress = there.session.progress
    assert (progress.steps, progress.rides, progress.requests) == (1, 30, 1)
    assert (progress.changes, progress.decisions) == (1, 1)
    assert progress.missed == 5, "those of the second round; the first is the past"
    assert progress.actors == 2 and set(progress.silent or ()) == {"ffn-1"}
    found = list(entries(path))
    assert [entry.data["number"] for entry in found if entry.kind == "change"] == [2]
    assert [entry.data["number"] for entry in found if entry.kind == "decision"] == [2]
    seen = summarise(path)
    assert (seen.requests, seen.failed, seen.ttft.count) == (1, 0, 0)
    by_name = {actor.name: actor for actor in seen.actors}
    assert by_name["attention-0"].count == 1 and by_name["attention-0"].requests == 8.0
    assert by_name["ffn-0"].count == 30 and by_name["ffn-0"].busy == 0.0
    assert seen.model_dump_json()


async def test_it_ends_by_itself_and_takes_its_leave(path: Path, monkeypatch) -> None:
    monkeypatch.setattr("autoscaler.record.EVERY_S", 0.01)
    there, told = Deployment(path), []
    await there.session.run(0.05, lambda progress: told.append(progress.seconds))
    assert len(told) >= 2 and told[-1] >= 0.05
    assert there.manager.asked[-1] == "unlisten"


async def test_it_may_be_called_off(path: Path) -> None:
    there, begun = Deployment(path), asyncio.Event()
    task = asyncio.create_task(there.session.run(60.0, lambda progress: begun.set()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert there.manager.asked[-1] == "unlisten"
    assert {entry.kind for entry in entries(path)} == {"steps", "rides"}


async def test_with_everybody_away_it_goes_on(path: Path) -> None:
    there = Deployment(path)
    gone = RayActorError()
    there.manager.methods = dict.fromkeys(("workers", "listen", "unlisten", "history"), gone)
    there.controller.methods["decisions"] = gone
    await there.session.round()
    assert there.session.progress.away
    assert isinstance(there.session.progress, Progress) and list(entries(path)) == []


def test_a_header_says_what_is_known() -> None:
    spec = ClusterSpec.model_validate({"model": {"path": "nowhere"}, "lanes": 2})
    header = header_of(spec, {})
    assert header.model == "nowhere" and header.slots is None and header.lanes == 2
    header = header_of(spec, {"attention-0": attention(0.0), "ffn-0": ffn(0.0)})
    assert (header.slots, header.kv_tokens, header.layers) == (32, 4096, 3)
    assert (header.attention, header.ffn) == (1, 1)
