"""``afflux observe``: words, exit codes and times; Prometheus is faked."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from afflux.main import app
from afflux.observe import moment
from cluster.paths import project_root
from dashboards import draw, local
from dashboards.local import Running, TargetState

run = CliRunner().invoke

RUNNING = Running(42, 1.0, "http://127.0.0.1:9090", "http://127.0.0.1:9464/sd")
UP = TargetState("http://127.0.0.1:4000/metrics", "afflux", "up", "")
DOWN = TargetState("http://127.0.0.1:4001/metrics", "afflux", "down", "connection refused")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(local, "executable", lambda: "prometheus")
    return tmp_path / "afflux" / "observe"


def test_up_starts_with_the_projects_configuration(state, monkeypatch):
    calls = []

    def start(*given, **options):
        calls.append((given, options))
        return RUNNING

    monkeypatch.setattr(local, "start", start)
    url = "http://127.0.0.1:9464/"
    done = run(app, ["observe", "up", "--metrics-url", url, "--name", "two", "--port", "0"])
    assert done.exit_code == 0, done.output
    template = project_root() / "deploy" / "prometheus" / "prometheus.yml"
    given_ = (state / "two", template, "http://127.0.0.1:9464/sd")
    assert calls == [(given_, {"port": 0, "days": 15})]
    assert "Prometheus: http://127.0.0.1:9090 (pid 42)" in done.stdout
    assert "afflux observe down --name two" in done.stdout


def test_up_without_prometheus_says_how_to_install(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    done = run(app, ["observe", "up"])
    assert done.exit_code == 1 and "apt-get install prometheus" in done.stderr


def test_down(state, monkeypatch):
    calls = []

    def stop(folder, *, remove_data):
        calls.append((folder, remove_data))
        return None if remove_data else RUNNING

    monkeypatch.setattr(local, "stop", stop)
    assert run(app, ["observe", "down"]).stdout == "stopped http://127.0.0.1:9090\n"
    done = run(app, ["observe", "down", "--delete-data"])
    assert done.stdout == "no Prometheus of afflux runs here; its data are deleted\n"
    assert calls == [(state / "afflux", False), (state / "afflux", True)]


@pytest.mark.parametrize(("pages", "code"), [([UP], 0), ([UP, DOWN], 1), ([], 1)])
def test_status(monkeypatch, pages, code):
    monkeypatch.setattr(local, "find", lambda folder: RUNNING)
    monkeypatch.setattr(local, "targets", lambda running: pages)
    done = run(app, ["observe", "status"])
    assert done.exit_code == code
    assert f"{pages.count(UP)} of {len(pages)} pages answer" in done.stdout
    as_json = json.loads(run(app, ["observe", "status", "--json"]).stdout)
    assert as_json["pid"] == 42 and len(as_json["targets"]) == len(pages)


@pytest.mark.parametrize("command", ["status", "draw"])
def test_nothing_runs(command):
    done = run(app, ["observe", command, "--name", "two"])
    assert done.exit_code == 1
    assert "start it with: afflux observe up --name two" in done.stderr


def test_draw(tmp_path, monkeypatch):
    calls = []

    def fake(url, boards, start, end, folder, *, titles):
        calls.append((url, len(boards), end - start, folder, titles))
        return [folder / "a.png"]

    monkeypatch.setattr(draw, "draw", fake)
    line = ["observe", "draw", "--url", "http://p:1", "--start", "-10m", "--end", "-5m"]
    done = run(app, [*line, "--out", str(tmp_path), "--panel", "One", "--panel", "Two"])
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'a.png'}\n"
    assert calls == [("http://p:1", 4, pytest.approx(300.0), tmp_path, ["One", "Two"])]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--start", "yesterday"], "cannot read the time 'yesterday'"),
        (["--start", "-1m", "--end", "-2m"], "is not before"),
        (["--panel", "Nope"], "there is no panel 'Nope'"),
    ],
)
def test_draw_refuses(words, text):
    done = run(app, ["observe", "draw", "--url", "http://127.0.0.1:1", *words])
    assert done.exit_code == 2
    assert text in " ".join(done.stderr.replace("│", " ").split())


NOW = 1_700_000_000.0


def test_moments():
    assert moment("now", NOW) == NOW
    assert moment("-90s", NOW) == NOW - 90 and moment("-1.5h", NOW) == NOW - 5400
    assert moment("1700000000.5", NOW) == NOW + 0.5
    assert moment("2026-01-31T12:00:00", NOW) == datetime(2026, 1, 31, 12).timestamp()
    assert moment("2026-01-31T12:00:00+00:00", NOW) == 1769860800.0


@pytest.mark.parametrize("text", ["", "soon", "-5", "-5y", "1.2.3", "-1.2.3m", "2026-13-01"])
def test_no_moments(text):
    with pytest.raises(ValueError, match="expected a time like"):
        moment(text, NOW)


@given(st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)))
def test_iso_times_are_read_back(when):
    assert moment(when.isoformat(), NOW) == when.timestamp()
