"""``afflux model show``: of a benchmark, a recording, a deployment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from afflux.main import app
from autoscaler import launch, recorded
from autoscaler.journal import describe
from autoscaler.model import Check, Model
from planner.curves import Linear, PiecewiseLinear
from planner.latency import Latencies
from tests.autoscaler.test_benchmarked import written

MODEL = Model(
    Latencies(
        Linear(1e-5, 2e-3),
        PiecewiseLinear(((0.0, 0.001), (8.0, 0.01))),
        Linear(1e-4, 1e-3),
        attention_per_request=3e-4,
        source="telemetry",
    ),
    theta=321.0,
    prompt_mean=100.0,
    layers=4,
    error=0.07,
    samples={"attention": 12, "ffn": 9},
    intervals={"attention.a": (0.9e-5, 1.1e-5), "attention.b": (1e-3, 3e-3)},
    checks=(Check(10.0, 3, 5, 40.0, 320.0, 0.22, 0.2), Check(20.0, 3, 5, 41.0, 322.0, 0.18, 0.2)),
)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["model", "show", *words])


def deployment(monkeypatch: pytest.MonkeyPatch, model: Model | None) -> None:
    monkeypatch.setattr(launch, "model", lambda name, address=None: describe(model))


def test_of_a_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment(monkeypatch, MODEL)
    shown = run()
    assert shown.exit_code == 0, shown.output
    for text in (
        "reliable; stage times from telemetry",
        "1e-05 × tokens of a lane + 0.002 + 0.0003 × requests",
        "slope 9e-06 to 1.1e-05",
        "12 samples",
        "context of a running request 321",
        "off by 7.0%",
        "3A5F",
        "+10.0 %",
        "-10.0 %",
    ):
        assert text in shown.output


def test_of_one_that_is_not_to_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment(monkeypatch, Model(MODEL.latencies, reliable=False, why="ffn: 2 samples"))
    shown = run()
    assert "NOT RELIABLE: ffn: 2 samples" in shown.output
    assert "no window was compared" in shown.output


def test_before_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment(monkeypatch, None)
    shown = run()
    assert shown.exit_code == 1 and "no model yet" in shown.output


def test_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    deployment(monkeypatch, MODEL)
    data = json.loads(run("--json").output)
    assert data["theta"] == 321.0 and data["nu2"] is None
    assert data["checks"][1]["observed"] == 0.2
    assert Latencies.from_json(json.dumps(data["latencies"])) == MODEL.latencies


def test_of_a_recording(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recorded, "model_of", lambda path: MODEL)
    path = tmp_path / "day.jsonl"
    path.touch()
    shown = run("--telemetry", str(path))
    assert shown.exit_code == 0 and "3A5F" in shown.output


def test_of_a_benchmark(tmp_path: Path) -> None:
    path = written(tmp_path / "split.json")
    shown = run("--benchmark", str(path))
    assert shown.exit_code == 0, shown.output
    assert "split.json, model one" in shown.output and "over 14 settings" in shown.output
    data = json.loads(run("--benchmark", str(path), "--json").output)["one"]
    assert len(data["settings"]) == 14 and data["error"] < 0.05


def test_bad_files_have_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"details": {}}', encoding="utf-8")
    shown = run("--benchmark", str(path))
    assert shown.exit_code == 1 and "afflux bench decode" in shown.output
    both = run("--benchmark", str(path), "--telemetry", str(path))
    assert both.exit_code == 2 and "not both" in both.output
