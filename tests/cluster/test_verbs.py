"""The verbs as functions: what is asked of the manager, and how a change is followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from actors.errors import AffluxError
from cluster import connection, launcher, verbs
from cluster.connection import ManagerAway
from cluster.status import ChangeReport, ClusterStatus


def report(phase: str) -> ChangeReport:
    data = {"number": 3, "verb": "scale", "text": "ffn 1 -> 2", "phase": phase, "started_at": 1.0}
    return ChangeReport.model_validate(data)


class FakeManager:
    """Every call answers the next of ``answers``; an exception is raised as ``ray.get`` would."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            def remote(_, *words: Any, **options: Any) -> Any:  # noqa: N805
                self.calls.append((name, words, options))
                return self.answers.pop(0)

        return Method()


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    fake = FakeManager()

    @contextmanager
    def manager_of(name: str, address: str | None = None) -> Iterator[FakeManager]:
        assert (name, address) == ("x", "h:1")
        yield fake

    def ray_get(answer: Any, timeout: float) -> Any:
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(verbs, "manager_of", manager_of)
    monkeypatch.setattr(connection.ray, "get", ray_get)
    monkeypatch.setattr(verbs, "POLL_S", 0.01)
    return fake


@pytest.mark.parametrize(
    ("verb", "words", "options", "call"),
    [
        ("scale", (), {"ffn": 2}, ((), {"attention": None, "ffn": 2})),
        ("retire", ("ffn-1",), {"replace": True}, (("ffn-1",), {"replace": True})),
        ("flip", ("ffn-1",), {"to": "attention"}, (("ffn-1",), {"to": "attention"})),
        ("rebalance", (), {}, ((), {})),
    ],
)
def test_a_verb_asks_and_follows_to_the_end(
    manager: FakeManager, verb: str, words: Any, options: Any, call: Any
) -> None:
    manager.answers = [report("queued"), report("commit"), report("done")]
    seen: list[str] = []
    # The same functions under both names.
    assert getattr(launcher, verb) is getattr(verbs, verb)
    done = getattr(verbs, verb)(
        "x", *words, **options, address="h:1", on_change=lambda r: seen.append(r.phase)
    )
    assert done.phase == "done"
    assert seen == ["queued", "commit", "done"]
    assert manager.calls[0] == (verb, *call)
    assert [name for name, *_ in manager.calls[1:]] == ["change", "change"]


def test_without_waiting_the_first_report_comes_back(manager: FakeManager) -> None:
    manager.answers = [report("queued")]
    assert verbs.scale("x", ffn=2, wait=False, address="h:1").phase == "queued"


def test_a_change_that_is_not_over_in_time_comes_back_as_it_is(manager: FakeManager) -> None:
    manager.answers = [report("queued"), report("prepare")]
    slow = verbs.scale("x", ffn=2, timeout_s=0, address="h:1")
    assert slow.phase == "queued" and len(manager.calls) == 1
    manager.answers = [ActorUnavailableError("restarting", None)]
    with pytest.raises(ManagerAway):
        verbs.follow(manager, slow, 0.001, None)


def test_scaling_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="attention=N, ffn=N or both"):
        verbs.scale("x")


def test_a_manager_that_restarts_is_waited_for(manager: FakeManager) -> None:
    away = [ActorUnavailableError("restarting", None), GetTimeoutError("late")]
    manager.answers = [report("queued"), *away, report("done")]
    assert verbs.rebalance("x", address="h:1").phase == "done"


def test_a_manager_that_stays_away_ends_the_wait(
    manager: FakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "AWAY_S", 0.03)
    manager.answers = [report("queued")] + [ActorUnavailableError("gone", None)] * 1000
    with pytest.raises(ManagerAway, match=r"what serves goes on serving"):
        verbs.rebalance("x", address="h:1")


@pytest.mark.parametrize(
    "answer",
    [
        AffluxError("no change 3", "unknown_change"),
        report("done").model_copy(update={"text": "ffn 1 -> 9"}),
    ],
)
def test_a_manager_that_forgot_the_change_says_to_ask_again(
    manager: FakeManager, answer: Any
) -> None:
    if isinstance(answer, AffluxError):
        answer = RayTaskError("change", "traceback", answer)
    manager.answers = [report("queued"), ActorUnavailableError("restarting", None), answer]
    with pytest.raises(verbs.ChangeForgotten, match=r"change 3 \(scale ffn 1 -> 2\).*ask again"):
        verbs.rebalance("x", address="h:1")


def test_questions(manager: FakeManager) -> None:
    manager.answers = [[report("done")], report("done")]
    assert verbs.changes("x", limit=7, address="h:1") == [report("done")]
    assert verbs.change("x", 3, 0.5, address="h:1") == report("done")
    assert manager.calls == [("history", (7,), {}), ("change", (3, 0.5), {})]


def test_watching_goes_on_while_the_manager_is_away(manager: FakeManager) -> None:
    status = ClusterStatus(name="x", url=None, health="ready", epoch=1, lanes=1, model="m")
    manager.answers = [status, ActorUnavailableError("restarting", None), status]
    seen = verbs.watch("x", interval_s=0.001, address="h:1")
    details = [next(seen).detail for _ in range(3)]
    assert details[0] == details[2] == ""
    assert "is restarting or out of reach" in details[1] and "last known state" in details[1]
    manager.answers = [ActorUnavailableError("restarting", None)]
    with pytest.raises(ManagerAway):
        next(verbs.watch("x", address="h:1"))


def test_errors_of_our_own_come_as_themselves(manager: FakeManager) -> None:
    cause = AffluxError("ffn.max is 4", "refused")
    manager.answers = [RayTaskError("scale", "traceback", cause)]
    with pytest.raises(AffluxError) as raised:
        verbs.scale("x", ffn=9, address="h:1")
    assert raised.value is cause
