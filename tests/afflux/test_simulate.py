"""``afflux simulate`` as a user runs it: tables, files, changes, mistakes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from afflux.main import app
from afflux.simulate import COLUMNS, parse_failure, parse_rate, parse_scale
from planner.events import Failure, Scale
from planner.latency import Latencies, Linear

run = CliRunner().invoke
LOAD = ["--workload", "fixed:40,geometric:12", "--batch", "8"]
CLOSED = ["--attention", "2", *LOAD, "--latency", "deepseek-v3-npu"]


@pytest.fixture
def seconds(tmp_path: Path) -> str:
    """Latencies in seconds, prefill included."""
    latencies = Latencies(
        attention=Linear(1e-6, 0.004),
        ffn=Linear(1e-4, 0.004),
        transfer=Linear(1e-6, 0.001),
        prefill=Linear(1e-5, 0.001),
        source="made up",
    )
    file = tmp_path / "latency.json"
    file.write_text(latencies.to_json())
    return str(file)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rows = "".join(
        json.dumps(
            {
                "timestamp": 20 * i,
                "input_length": 600,
                "output_length": 1 + i % 9,
                "hash_ids": [0, 1000 + i],
            }
        )
        + "\n"
        for i in range(300)
    )
    file = tmp_path / "trace.jsonl"
    file.write_text(rows)
    return str(file)


def ask(*words: str) -> str:
    result = run(app, ["simulate", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def summary_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())["summary"]


def test_a_closed_loop_meets_the_theory(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    text = ask(*CLOSED, "--json", str(file))
    for words in ("2A1F: 2 lanes of 8 slots", "barrier-aware theory", "per token of a request"):
        assert words in text
    summary = summary_of(file)
    assert summary["completed"] == summary["arrived"] > 2000
    assert summary["per_instance"] == pytest.approx(summary["theory_per_instance"], rel=0.05)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate(("1", "1", "2")):
        file = tmp_path / f"{number}.json"
        ask(*CLOSED, "--requests", "200", "--seed", seed, "--json", str(file))
        found.append(summary_of(file)["makespan"])
    assert found[0] == found[1] != found[2]


def test_fresh_slots_begin_with_a_small_load(tmp_path: Path) -> None:
    found = {}
    for words in ([], ["--fresh"]):
        file = tmp_path / "run.json"
        ask(*CLOSED, "--until", "3000", *words, "--json", str(file))
        found[bool(words)] = summary_of(file)["step_time"]
    assert found[True] < found[False]


def test_every_file_that_was_asked_for(tmp_path: Path) -> None:
    png, chrome, table = tmp_path / "a" / "run.png", tmp_path / "b" / "c.json", tmp_path / "r.csv"
    files = ["--png", str(png), "--chrome-trace", str(chrome), "--requests-csv", str(table)]
    ask(*CLOSED, "--requests", "300", "--steps", "3", *files)
    assert png.read_bytes().startswith(b"\x89PNG")
    events = json.loads(chrome.read_text())["traceEvents"]
    assert {"attention", "ffn", "a2f", "f2a"} <= {event["name"] for event in events}
    with table.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 600
    assert tuple(rows[0]) == COLUMNS
    # Who was under way at the start has no first token that anybody saw
    known = [row for row in rows if row["first_token"]]
    assert known and len(known) < len(rows)
    for row in known:
        ttft = float(row["first_token"]) - float(row["arrival"])
        assert math.isclose(float(row["ttft"]), ttft, abs_tol=1e-9)
        assert (row["tpot"] == "") == (row["output"] == "1")


def test_arrivals_changes_and_losses_over_time(seconds: str, tmp_path: Path) -> None:
    png, file = tmp_path / "run.png", tmp_path / "run.json"
    text = ask(
        "--attention", "2", "--ffn", "2", *LOAD, "--latency", seconds, "--rate", "60",
        "--requests", "1200", "--prefill", "colocated", "--scale", "3:attention=+1",
        "--scale", "5:ffn=3", "--fail", "8:attention-0", "--fail", "10:ffn", "--prepare", "1",
        "--detect", "0.5", "--recover", "0.5", "--png", str(png), "--json", str(file),
    )  # fmt: skip
    assert "Poisson arrivals, 60 requests/s" in text
    assert "first token" in text
    assert "at 4 s:" in text and "at 8 s:" in text and "at 10 s:" in text
    assert png.read_bytes().startswith(b"\x89PNG")
    summary = summary_of(file)
    assert summary["completed"] == 1200
    assert (summary["attention_left"], summary["ffn_left"]) == (2, 2)
    assert summary["replayed"] > 0
    assert summary["theory_per_instance"] is None


def test_a_trace_as_recorded_and_at_another_rate(seconds: str, trace: str, tmp_path: Path) -> None:
    words = ["--attention", "1", "--batch", "8", "--trace", trace, "--latency", seconds]
    prefill = ["--prefill", "disaggregated", "--prefill-workers", "1", "--kv-time", "1e-6"]
    spans = {}
    for rate in ("recorded", "100"):
        file = tmp_path / "run.json"
        text = ask(*words, "--rate", rate, *prefill, "--json", str(file))
        assert "arrivals of the trace" in text
        spans[rate] = summary_of(file)["makespan"]
    assert spans["recorded"] == pytest.approx(6.0, rel=0.1)
    assert spans["100"] < 0.6 * spans["recorded"]
    assert "120 of 120" in ask(*words, "--rate", "recorded", "--requests", "120")


def test_a_full_queue_refuses(seconds: str) -> None:
    limits = ["--rate", "2000", "--requests", "500", "--max-queue", "5", "--kv-tokens", "500"]
    assert "rejected" in ask("--attention", "1", *LOAD, "--latency", seconds, *limits)


def test_asynchronous_boarding_has_steps_to_draw(tmp_path: Path) -> None:
    png = tmp_path / "run.png"
    words = ["--boarding", "asynchronous", "--requests", "200", "--png", str(png)]
    assert "asynchronous boarding" in ask(*CLOSED, *words)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_joint_steps_have_time_outside_of_the_layers(tmp_path: Path) -> None:
    latencies = Latencies(
        Linear(0.0, 1.0), Linear(0.0, 1.0), Linear(0.0, 0.0), outside=Linear(0.0, 5.0), source="x"
    )
    file = tmp_path / "latency.json"
    file.write_text(latencies.to_json())
    found = {}
    for words in ([], ["--boarding", "asynchronous", "--joint-steps"]):
        result = tmp_path / "run.json"
        ask("--attention", "1", *LOAD, "--latency", str(file), *words, "--json", str(result))
        found[bool(words)] = summary_of(result)["step_time"]
    assert found[True] == pytest.approx(1 + 1 + 1 + 5)
    # Folded: each of two lanes carries half of it, and the other one overlaps
    assert found[False] == pytest.approx(2 * (1 + 2.5), rel=1e-3)


def test_prefill_without_prefill_times_is_noted() -> None:
    result = run(app, ["simulate", *CLOSED, "--requests", "50", "--prefill", "colocated"])
    assert result.exit_code == 0, result.output
    assert "--prefill-time gives one" in result.stderr
    with_time = ["--prefill", "colocated", "--prefill-time", "0.1", "--requests", "50"]
    assert run(app, ["simulate", *CLOSED, *with_time]).stderr == ""


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (CLOSED[2:], "Missing option '--attention'"),
        (["--attention", "0", *CLOSED[2:]], "--attention"),
        ([*CLOSED, "--rate", "-3"], "--rate is '-3'; expected requests per unit of time"),
        ([*CLOSED, "--rate", "nan"], "--rate is 'nan'"),
        ([*CLOSED, "--rate", "recorded"], "needs --trace FILE"),
        ([*CLOSED, "--trace", "x.csv"], "both were given"),
        ([*CLOSED, "--scale", "attention+1"], "expected AT:ROLE=N, as in 30:attention=+1"),
        ([*CLOSED, "--scale", "x:attention=1"], "'x' in --scale 'x:attention=1' is no time"),
        ([*CLOSED, "--fail", "3:atention"], "expected AT:ROLE, as in 30:ffn"),
        ([*CLOSED, "--scale", "3:ffn=0"], "give at least 1"),
        ([*CLOSED, "--fail=-3:ffn"], "give a finite time >= 0"),
        ([*CLOSED, "--kv-tokens", "9"], "limit who is admitted"),
        ([*CLOSED, "--boarding", "never"], "never"),
        ([*CLOSED, "--joint-steps"], "give --boarding asynchronous too"),
        ([*CLOSED, "--png", "run.txt"], "run.txt is no picture"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_expected(words: list[str], text: str) -> None:
    result = run(app, ["simulate", *words])
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--scale", "3:attention=-5"], "1 is the least"),
        (["--prefill", "disaggregated"], "at least 1"),
        (["--until", "-1"], "until is -1.0"),
        (["--requests-csv", "{folder}/file/r.csv"], "cannot write"),
        (["--chrome-trace", "{folder}/file/c.json"], "cannot write"),
    ],
)
def test_what_cannot_be_simulated_is_one_clear_line(
    words: list[str], text: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    words = [word.format(folder=tmp_path) for word in words]
    result = run(app, ["simulate", *CLOSED, "--requests", "40", *words])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert text in result.stderr
    assert "not foreseen" not in result.stderr


def test_recorded_times_need_latencies_in_seconds(trace: str) -> None:
    words = ["--attention", "1", "--batch", "8", "--trace", trace, "--latency", "deepseek-v3-npu"]
    result = run(app, ["simulate", *words, "--rate", "recorded"])
    assert result.exit_code == 1
    assert "give the --rate as a number of requests per cycle" in result.stderr
    ask(*words, "--rate", "0.001")


@given(
    st.floats(0, 1e6, allow_nan=False),
    st.sampled_from(["attention", "ffn"]),
    st.sampled_from(["", "+", "-"]),
    st.integers(1, 99),
)
def test_scales_come_back(at: float, role: str, sign: str, count: int) -> None:
    found = parse_scale(f"{at!r}:{role}={sign}{count}")
    change = -count if sign == "-" else count
    assert found == Scale(at, **{role: change}, relative=bool(sign))  # type: ignore[arg-type]


def test_failures_come_back() -> None:
    assert parse_failure("3:ffn", 1.0, 2.0) == Failure(3.0, "ffn", detect=1.0, recover=2.0)
    assert parse_failure(" 3:attention", 1.0) == Failure(3.0, "attention", detect=1.0)
    assert parse_failure("3.5:attention-12") == Failure(3.5, "attention", worker=12)


@pytest.mark.parametrize("text", ["", "3", "3:ffn-1", "3:attention-", "3:attention--1", ":ffn"])
def test_failures_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected AT:ROLE"):
        parse_failure(text)


def test_rates(tmp_path: Path) -> None:
    assert parse_rate(None, None) is None
    assert parse_rate("2.5", None) == 2.5
    assert parse_rate(" Recorded", tmp_path) == "recorded"
    for text in ("0", "inf", "fast", ""):
        with pytest.raises(ValueError, match="expected requests per unit of time"):
            parse_rate(text, None)
