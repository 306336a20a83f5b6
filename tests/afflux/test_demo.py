"""The demo always stops what it started, unless it is told to keep it."""

import pytest

from afflux import demo


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    called: list[str] = []

    def afflux(*arguments: str) -> int:
        called.append(arguments[0])
        return 0

    monkeypatch.setattr(demo, "_afflux", afflux)
    monkeypatch.setattr(demo, "ask", lambda *_: called.append("chat"))
    for name in ("KEEP", "PORT", "PROMPT"):
        monkeypatch.delenv(name, raising=False)
    return called


def test_up_chat_status_down(commands: list[str]):
    assert demo.main() == 0
    assert commands == ["up", "chat", "status", "down"]


def test_keep(commands: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KEEP", "1")
    assert demo.main() == 0
    assert commands == ["up", "chat", "status"]


def test_a_failed_request_still_stops_it(
    commands: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(*_: str) -> None:
        raise ConnectionError("refused")

    monkeypatch.setenv("KEEP", "1")
    monkeypatch.setattr(demo, "ask", fails)
    assert demo.main() == 1
    assert commands == ["up", "down"]
    assert "ConnectionError: refused" in capsys.readouterr().err


def test_a_failed_start_still_stops_it(commands: list[str], monkeypatch: pytest.MonkeyPatch):
    def afflux(*arguments: str) -> int:
        commands.append(arguments[0])
        return 1 if arguments[0] == "up" else 0

    monkeypatch.setattr(demo, "_afflux", afflux)
    assert demo.main() == 1
    assert commands == ["up", "down"]
