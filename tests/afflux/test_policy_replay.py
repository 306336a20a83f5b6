"""``afflux policy replay`` and ``tune`` as a user runs them: tables, files, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

from actors.errors import AffluxError
from afflux import policy_replay
from afflux.policy_replay import parse_range
from cluster.spec import AutoscalerSpec
from planner.errors import PlannerError
from planner.latency import Latencies, Linear

app = typer.Typer()
app.command("replay")(policy_replay.replay)
app.command("tune")(policy_replay.tune)
FEW = ["--attention-max", "4", "--ffn-max", "2", "--slots", "8", "--prepare", "1", "--interval"]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    """A minute of requests, and latencies."""
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    rows += [f"{at / 8},{100 + at % 50},{10 + at % 20}" for at in range(480)]
    trace = tmp_path / "trace.csv"
    trace.write_text("\n".join(rows) + "\n")
    latency = tmp_path / "latency.json"
    latencies = Latencies(
        Linear(2e-5, 0.01), Linear(1e-4, 0.01), Linear(1e-5, 0.002), prefill=Linear(5e-5, 0.0)
    )
    latency.write_text(latencies.to_json())
    return ["--trace", str(trace), "--latency", str(latency), *FEW, "1", "--window", "5"]


def test_policies_are_compared_and_written(given: list[str], tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    words = ("--policy", "slo_feedback", "--policy", "static", "--slo-ttft", "0.5")
    result = run("replay", *given, *words, "--json", str(out), "--png", str(picture))
    assert result.exit_code == 0, result.output
    assert "slo_feedback decided by:" in result.output
    assert "1A1F at the start" in result.output
    report = json.loads(out.read_text())
    summary = report["summary"]
    assert summary["ttft_target"] == 0.5
    assert summary["slo_feedback_attainment"] >= summary["static_attainment"]
    assert summary["static_changes"] == 0
    assert report["details"]["slo_feedback"]["windows"]
    assert (tmp_path / "out-slo_feedback.png").stat().st_size > 10_000
    assert (tmp_path / "out-static.png").exists()


def test_hindsight_is_shown_beside(given: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    result = run(
        "replay", *given, "--policy", "static", "--hindsight", "--jobs", "1", "--json", str(out)
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(out.read_text())["summary"]
    assert f"static {summary['best_static']}" in result.output
    assert summary["attainment_best_static"] >= summary["static_attainment"]


def test_tune_prints_a_section_that_a_spec_takes(given: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "front.png"
    result = run(
        "tune", *given, "--policy", "slo_feedback", "--set", "samples=3", "--range", "low=0.4:0.6",
        "--trials", "4", "--jobs", "1", "--png", str(picture),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    text = result.output[result.output.index("autoscaler:") :]
    section = yaml.safe_load(text[: text.index("drawn:")])["autoscaler"]
    spec = AutoscalerSpec.model_validate(section)
    assert spec.policy == "slo_feedback"
    assert spec.parameters["samples"] == 3
    assert picture.stat().st_size > 10_000


def test_a_spec_gives_policy_and_bounds(given: list[str], tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        yaml.safe_dump(
            {
                "model": {"path": "nowhere"},
                "attention": {"count": 2, "max": 3},
                "ffn": {"count": 2, "max": 3},
                "slo": {"ttft_s": 0.7},
                "autoscaler": {"policy": "static", "parameters": {"attention": 3}},
            }
        )
    )
    words = [word for word in given if word not in ("--attention-max", "4", "--ffn-max", "2")]
    result = run("replay", *words, "--spec", str(spec))
    assert result.exit_code == 0, result.output
    assert "attention 1..3, FFN 1..3" in result.output
    assert "2A2F at the start" in result.output
    assert "TTFT 0.7 s" in result.output
    assert "static decided by: " in result.output
    assert "fixed" in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "either --trace FILE or --telemetry FILE"),
        (["--trace", "trace.csv"], "--latency"),
    ],
)
def test_what_is_missing_is_named(words: list[str], said: str, given: list[str]) -> None:
    if words:
        words = given[:2]
    result = run("replay", *words)
    assert result.exit_code == 2
    assert said in " ".join(result.output.split()).replace("│ ", "")


def test_mistakes_are_refused_before_anything_runs(given: list[str]) -> None:
    result = run("replay", *given, "--policy", "nobody")
    assert isinstance(result.exception, AffluxError)
    result = run("replay", *given, "--attention-min", "9")
    assert isinstance(result.exception, AffluxError)
    result = run("replay", *given[2:], "--trace", given[3])
    assert isinstance(result.exception, PlannerError)
    both = ("--policy", "static", "--policy", "slo_feedback", "--set", "high=0.8")
    assert "one policy" in run("replay", *given, *both).output


def test_a_range_is_a_name_and_two_numbers() -> None:
    assert parse_range("inner.parameters.low=0.4:0.8") == ("inner.parameters.low", (0.4, 0.8))
    for text in ("low", "low=0.4", "=1:2", "low=a:b"):
        with pytest.raises(ValueError, match="LEAST:MOST"):
            parse_range(text)
