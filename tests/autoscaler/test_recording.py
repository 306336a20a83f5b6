"""Recordings: what is read is what was told, and what is damaged is named by file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.recording import (
    Header,
    Recorder,
    entries,
    is_recording,
    read_header,
    read_requests,
)
from autoscaler.recording_lines import BadRecording
from autoscaler.telemetry import Telemetry
from cluster.request_log import Done, First
from tests.autoscaler.told import AHEAD, attention, ffn, frontend, row

HEADER = Header(model="tiny", began=1.7e9, ttft_s=1.0, tpot_s=0.1, layers=3, top_k=2)


def done(number: int, arrival: float, prompt: int = 10, output: int = 5, outcome="stop") -> Done:
    at = arrival + AHEAD
    return Done(number, at + 1.0, at, 0.5, None, 1.0, prompt, output, 0, outcome, 0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "day.jsonl"


def test_what_was_told_comes_back(path: Path) -> None:
    steps = attention(2.0, [row(1.0), row(1.5, interrupted=1.0)], kv_usage=math.nan)
    rides = ffn(2.0, 10, 0.5)
    requests = frontend(2.0, [First(1, 5.0, 0.5, 7, 2), done(2, 1.0)], gaps={-50: 3}, waits=[0.5])
    with Recorder(path, HEADER) as recorder:
        recorder.batch("attention-0", steps)
        recorder.batch("ffn-0", rides)
        recorder.batch("frontend-0", requests)
        recorder.change(3.0, {"number": 1, "text": "1 -> 2"})
        recorder.decision(4.0, {"target": None})
    assert read_header(path) == HEADER and is_recording(path)
    found = list(entries(path))
    assert [entry.kind for entry in found] == ["steps", "rides", "requests", "change", "decision"]
    assert [entry.line for entry in found] == [2, 3, 4, 5, 6]
    assert [entry.name for entry in found[:3]] == ["attention-0", "ffn-0", "frontend-0"]
    np.testing.assert_array_equal(found[0].data["steps"], steps["steps"])
    np.testing.assert_array_equal(found[1].data["bins"], rides["bins"])
    assert found[0].data["kv_usage"] is None and found[0].data["role"] == "attention"
    assert "experts" not in found[1].data
    assert found[2].data["events"] == requests["events"]
    assert found[2].data["gaps"] == {-50: 3} and found[2].data["waits"] == [0.5]
    assert found[3].data == {"number": 1, "text": "1 -> 2"} and found[4].at == 4.0


def test_a_recording_is_telemetry(path: Path) -> None:
    live, replayed = Telemetry(), Telemetry()
    with Recorder(path, HEADER) as recorder:
        for second in range(10):
            for name, batch in (
                ("attention-0", attention(second, [row(second - 0.5)], 100 + second)),
                ("ffn-0", ffn(second, 10 * second, 0.5 * second)),
                ("frontend-0", frontend(second, [done(second + 1, second - 1.0)])),
            ):
                live.take(name, batch, second)
                recorder.batch(name, batch)
    for entry in entries(path):
        replayed.take(entry.name, entry.data, entry.at)
    assert repr(live.snapshot(9.5)) == repr(replayed.snapshot(9.5))


def test_a_recording_goes_on(path: Path) -> None:
    for number in range(2):
        with Recorder(path, HEADER.model_copy(update={"began": float(number)})) as recorder:
            recorder.change(float(number), {})
    assert [entry.at for entry in entries(path)] == [0.0, 1.0]
    assert read_header(path).began == 0.0
    with pytest.raises(BadRecording, match="is a recording of tiny, not of large"):
        Recorder(path, HEADER.model_copy(update={"model": "large"}))


def test_a_line_that_was_being_written_is_left_out(path: Path) -> None:
    with Recorder(path, HEADER) as recorder:
        recorder.change(1.0, {})
        recorder.change(2.0, {"text": "x" * 100_000})
    path.write_bytes(path.read_bytes()[:-10])
    assert [entry.at for entry in entries(path)] == [1.0]
    with Recorder(path, HEADER) as recorder:
        recorder.change(3.0, {})
    assert [entry.at for entry in entries(path)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"day.jsonl:3: not JSON"),
        ("[1]", r"day.jsonl:3: expected an object, found list"),
        ('{"kind": "x"}', r"day.jsonl:3: kind is 'x', expected one of steps, rides"),
        ('{"kind": ["x"]}', r"day.jsonl:3: kind is \['x'\]"),
        ('{"kind": "change", "at": "now"}', r"day.jsonl:3: expected at \(a number\)"),
        (
            '{"kind": "requests", "at": 1, "name": "f", "data": {"clock": 1}}',
            r"day.jsonl:3: requests lack incarnation, unix, number, events",
        ),
        (
            '{"kind": "requests", "at": 1, "name": "f", "data": {"clock": 1, "unix": 1, '
            '"incarnation": "a", "number": 1, "events": [["First", 1]]}}',
            r"day.jsonl:3: requests are damaged",
        ),
        (
            '{"kind": "steps", "at": 1, "name": "f", "data": {"clock": 1, "unix": 1, '
            '"incarnation": "a", "number": 1, "columns": ["a", "b"], "steps": [[1, 2], [3]]}}',
            r"day.jsonl:3: steps are damaged",
        ),
    ],
)
def test_a_damaged_line_is_named(path: Path, text: str, words: str) -> None:
    with Recorder(path, HEADER) as recorder:
        recorder.change(1.0, {})
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(BadRecording, match=words):
        list(entries(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "day.jsonl:1: not JSON"),
        ('{"timestamp": 0}\n', "day.jsonl:1: no recording of telemetry"),
        ('{"format": "afflux-telemetry", "version": 2}\n', "day.jsonl:1: version 2 of the format"),
        ('{"format": "afflux-telemetry", "version": 1, "model": 7}\n', "day.jsonl:1: model"),
    ],
)
def test_what_is_no_recording(path: Path, text: str, words: str) -> None:
    path.write_text(text)
    with pytest.raises(BadRecording, match=words):
        read_header(path)
    with pytest.raises(BadRecording, match="cannot read"):
        read_header(path.parent / "nowhere")
    with pytest.raises(BadRecording, match="cannot record"):
        Recorder(path.parent / "nowhere" / "day.jsonl", HEADER)


def test_requests_as_a_trace(path: Path) -> None:
    with Recorder(path, HEADER) as recorder:
        recorder.batch("frontend-1", frontend(9.0, [done(1, 4.0, 30, 3)]))
        told = frontend(
            9.0, [done(1, 6.0, 10, 1), done(2, 5.0, 20, 2), done(3, 1.0, outcome="abort")]
        )
        recorder.batch("frontend-0", told)
        recorder.batch("frontend-0", told)
    trace = read_requests(path)
    assert trace.arrival.tolist() == pytest.approx([0.0, 1.0, 2.0])
    assert trace.prompt.tolist() == [30, 20, 10] and trace.output.tolist() == [3, 2, 1]
    assert trace.skipped == 1 and trace.source == str(path)


def test_a_recording_without_requests_is_no_trace(path: Path) -> None:
    Recorder(path, HEADER).close()
    with pytest.raises(BadRecording, match="no request ended"):
        read_requests(path)
    assert not is_recording(path.parent / "nowhere")


@given(st.dictionaries(st.text(), st.one_of(st.none(), st.floats(), st.text(), st.integers())))
def test_any_report_can_be_written(tmp_path_factory, report) -> None:
    path = tmp_path_factory.mktemp("recording") / "day.jsonl"
    with Recorder(path, HEADER) as recorder:
        recorder.decision(1.0, report)
    (entry,) = entries(path)
    assert entry.data.keys() == report.keys()
    assert all(json.dumps(value) for value in entry.data.values())
