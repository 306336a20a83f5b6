"""``afflux telemetry``: durations, and what ``show`` prints of a recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afflux.main import app
from afflux.telemetry import duration
from autoscaler.recording import Header, Recorder
from cluster.request_log import First
from tests.autoscaler.test_recording import done
from tests.autoscaler.told import AHEAD, attention, ffn, frontend, row


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("5m", 300), ("1.5h", 5400), (" 1d ", 86400)]
)
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "5 minutes", "m", "inf", "nan", "1e3"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="write it as in 90s, 5m"):
        duration(text)


def test_record_refuses_it_before_it_asks_anybody() -> None:
    answer = CliRunner().invoke(app, ["telemetry", "record", "x.jsonl", "--duration", "soon"])
    assert answer.exit_code == 2 and "is no duration" in answer.stderr


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "day.jsonl"
    with Recorder(path, Header(model="tiny", began=0.0, ttft_s=2.0, tpot_s=0.2)) as recorder:
        recorder.batch("attention-0", attention(0.0))
        recorder.batch("ffn-0", ffn(0.0))
        recorder.batch("attention-0", attention(10.0, [row(5.0 + i) for i in range(5)]))
        recorder.batch("ffn-0", ffn(10.0, 20, 5.0))
        first = First(1, AHEAD + 4.0, 0.5, 100, 25)
        recorder.batch("frontend-0", frontend(10.0, [first, done(2, 3.0, 100, 5)]))
        recorder.change(4.0, {})
    return path


def test_show(recording: Path) -> None:
    answer = CliRunner().invoke(app, ["telemetry", "show", str(recording)])
    assert answer.exit_code == 0, answer.output
    lines = [" ".join(line.split()) for line in answer.stdout.splitlines()]
    assert lines[0].endswith("day.jsonl: tiny, 10 s, 1 changes, 0 decisions")
    assert "1 0.10 0 100 5.0 25%" in lines
    assert "TTFT 1 500 ms 500 ms 500 ms 500 ms 2.0 s" in lines
    assert "TPOT 0 - - - - 200 ms" in lines
    assert "attention-0 3% 5 100 ms 8.0 800 0" in lines
    assert "ffn-0 50% 20 250 ms - - 0" in lines


def test_show_as_json(recording: Path) -> None:
    answer = CliRunner().invoke(app, ["telemetry", "show", "--json", str(recording)])
    found = json.loads(answer.stdout)
    assert found["requests"] == 1 and found["actors"][1]["busy"] == 0.5


def test_what_is_no_recording_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens\n")
    answer = CliRunner().invoke(app, ["telemetry", "show", str(path)])
    assert answer.exit_code == 1 and "trace.csv:1:" in answer.stderr
