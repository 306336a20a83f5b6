"""``afflux dashboards``: files, checks, and errors as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from afflux.dashboards import _looks
from afflux.main import app
from cluster import companion, connection
from cluster.status import ActorEvent, ChangeReport
from dashboards import promtool
from tests.dashboards.stub_grafana import TOKEN, StubGrafana

run = CliRunner().invoke


def test_build_writes_a_file_for_each(tmp_path: Path) -> None:
    result = run(app, ["dashboards", "build", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0
    files = [Path(line) for line in result.output.split()]
    assert [json.loads(file.read_text())["uid"] for file in files] == [f.stem for f in files]
    assert len(files) == 4


def test_check_passes_and_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(promtool, "find", lambda: "/usr/bin/promtool")
    # what it says is tests/dashboards/test_rules.py's; it takes its time
    monkeypatch.setattr(promtool, "problems", lambda texts: given.extend(texts) or [])
    result = run(app, ["dashboards", "check"])
    assert result.exit_code == 0, result.output
    assert "4 dashboards, 13 alerts" in result.output
    assert "alert tests run" in result.output
    assert f"{len(given)} expressions" in result.output


def test_check_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from dashboards import build

    pages = build.build_all()
    pages["afflux-slo"]["editable"] = True
    monkeypatch.setattr(build, "build_all", lambda: pages)
    monkeypatch.setattr(promtool, "find", lambda: None)
    result = run(app, ["dashboards", "check"])
    assert result.exit_code == 1
    assert "afflux-slo: uneditable-dashboard: the dashboard is editable" in result.output
    assert "apt install prometheus" in result.output


def test_push_and_push_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    with StubGrafana() as stub:
        arguments = ["dashboards", "push", "--url", stub.url, "--folder", "LLM"]
        first, second = run(app, arguments), run(app, arguments)
    assert first.output.count("created: ") == 4
    assert second.output.count("unchanged: ") == 4
    assert stub.folders[0]["title"] == "LLM"


def test_push_without_a_token_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAFANA_TOKEN", raising=False)
    result = run(app, ["dashboards", "push"])
    assert result.exit_code == 1
    assert "set GRAFANA_TOKEN" in result.output


class Manager:
    """Answers as the manager's Ray handle does, or is away."""

    def __init__(self, history: list[ChangeReport], events: list[ActorEvent]):
        self._events = events
        self.away = False
        self.history = SimpleNamespace(remote=lambda limit: history[-limit:])
        self.events = SimpleNamespace(remote=lambda since=0: events[since:])

    def add(self, event: ActorEvent) -> None:
        self._events.append(event)

    def get(self, answer: Any, timeout_s: float) -> Any:
        if self.away:
            raise connection.ManagerAway("it is restarting")
        return answer


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> Manager:
    change = ChangeReport(number=1, verb="scale", text="ffn 1 -> 2", phase="done", started_at=100.0)
    lost = ActorEvent(actor="ffn-0", role="ffn", state="failed", detail="long ago", number=1)
    fake = Manager([change], [lost])

    @contextmanager
    def manager_of(name: str, address: str | None = None) -> Iterator[Manager]:
        assert (name, address) == ("mine", None)
        yield fake

    monkeypatch.setattr(connection, "manager_of", manager_of)
    monkeypatch.setattr(connection, "get", fake.get)
    monkeypatch.setattr(companion, "find", lambda name: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("GRAFANA_TOKEN", TOKEN)
    return fake


def test_annotate_once_writes_changes_and_no_events_of_unknown_time(manager: Manager) -> None:
    with StubGrafana() as stub:
        arguments = ["dashboards", "annotate", "--once", "--url", stub.url, "--name", "mine"]
        first, second = run(app, arguments), run(app, arguments)
    assert first.output == "created: scale ffn 1 -> 2: done\n"
    assert second.output == ""
    assert [one["time"] for one in stub.annotations] == [100_000]


def test_annotate_goes_on_over_a_manager_that_restarts(manager: Manager) -> None:
    looks = _looks("mine", None, once=False, interval=0.0)
    assert [len(list(part)) for part in next(looks)] == [1, 0, 0]
    manager.add(ActorEvent(actor="ffn-1", role="ffn", state="failed", number=2))
    assert [one["actor"] for one in next(looks)[1]] == ["ffn-1"]
    manager.away = True
    assert next(looks) == ([], [], [])
    manager.away = False
    assert next(looks)[0]
