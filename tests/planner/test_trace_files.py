"""Reading trace files: both formats, and what a bad one is told."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.trace_files import BLOCK_TOKENS
from planner.traces import Trace, read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

requests = st.lists(
    st.tuples(st.integers(0, 10**7), st.integers(0, 3000), st.integers(0, 500)),
    min_size=1,
    max_size=20,
).filter(lambda rows: any(output for _, _, output in rows))


def write(folder: Path, text: str | bytes, name: str = "trace") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mooncake(**changes: Any) -> str:
    row = {"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}
    row |= changes
    return json.dumps({name: value for name, value in row.items() if value is not ...})


def expected(rows: list[tuple[int, int, int]]) -> list[tuple[float, int, int]]:
    """In order of time, without those that made no token, seconds after the first."""
    kept = sorted((row for row in rows if row[2]), key=lambda row: row[0])
    return [(ms / 1e3 - kept[0][0] / 1e3, prompt, output) for ms, prompt, output in kept]


def check(trace: Trace, rows: list[tuple[int, int, int]]) -> None:
    assert trace.skipped == sum(not output for _, _, output in rows)
    found = zip(trace.arrival, trace.prompt, trace.output, strict=True)
    for one, other in zip(found, expected(rows), strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@settings(max_examples=40)
@given(rows=requests, packed=st.booleans(), dated=st.booleans())
def test_azure(rows: list, packed: bool, dated: bool, tmp_path_factory) -> None:
    def when(ms: int) -> str:
        seconds, ms = divmod(ms, 1000)
        hours, seconds = divmod(seconds, 3600)
        clock = f"{hours:02d}:{seconds // 60:02d}:{seconds % 60:02d}.{ms:03d}0000"
        return f"2023-11-16 {clock}" if dated else repr(3600 * hours + seconds + ms / 1000)

    text = HEADER + "".join(f"{when(ms)},{prompt},{output}\n" for ms, prompt, output in rows)
    data = gzip.compress(text.encode()) if packed else text.encode()
    trace = read_trace(write(tmp_path_factory.mktemp("azure"), data))
    check(trace, rows)
    assert trace.blocks is None


@settings(max_examples=40)
@given(rows=requests, packed=st.booleans(), hashed=st.booleans())
def test_mooncake(rows: list, packed: bool, hashed: bool, tmp_path_factory) -> None:
    text = "".join(
        mooncake(
            timestamp=ms,
            input_length=prompt,
            output_length=output,
            hash_ids=list(range(-(-prompt // BLOCK_TOKENS))) if hashed else ...,
        )
        + "\n"
        for ms, prompt, output in rows
    )
    data = gzip.compress(text.encode()) if packed else text.encode()
    trace = read_trace(write(tmp_path_factory.mktemp("mooncake"), data))
    check(trace, rows)
    if hashed:
        assert trace.blocks is not None
        assert [len(ids) for ids in trace.blocks] == [-(-p // BLOCK_TOKENS) for p in trace.prompt]
    else:
        assert trace.blocks is None


def test_blocks_stay_with_their_request_when_sorted(tmp_path: Path) -> None:
    late, early, dropped = (
        mooncake(timestamp=9, hash_ids=[1, 2]),
        mooncake(timestamp=3, hash_ids=[3, 4]),
        mooncake(timestamp=1, hash_ids=[5, 6], output_length=0),
    )
    trace = read_trace(write(tmp_path, "\n".join([late, dropped, early])))
    assert trace.blocks == ((3, 4), (1, 2))
    assert trace.arrival == pytest.approx([0, 0.006])
    assert trace.skipped == 1


def test_azure_as_published(tmp_path: Path) -> None:
    """Byte-order mark, carriage returns, columns in another order, zones, blank lines."""
    text = (
        "\ufeffContextTokens,Model,timestamp,GeneratedTokens\r\n"
        "374,gpt,2024-05-10 00:00:00.009930+00:00,44\r\n"
        "\r\n"
        '396,"a, b",2024-05-10 01:00:01.009930+01:00,109\r\n'
    )
    trace = read_trace(write(tmp_path, text))
    assert trace.arrival == pytest.approx([0, 1])
    assert trace.prompt.tolist() == [374, 396]


def test_limit_reads_the_first_rows_only(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "0,1,1\n1,2,2\n2,3,3\nbroken\n")
    assert read_trace(path, limit=2).prompt.tolist() == [1, 2]
    assert len(read_trace(path, limit=3)) == 3
    with pytest.raises(PlannerError, match="line 5: 1 values, expected 3 as in the header"):
        read_trace(path)
    with pytest.raises(PlannerError, match="limit is 0"):
        read_trace(path, limit=0)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("1,2", "2 values, expected 3 as in the header"),
        ("1,2,3,4", "4 values, expected 3 as in the header"),
        ("yesterday,2,3", "TIMESTAMP is 'yesterday', expected a date and time in ISO 8601"),
        ("nan,2,3", "TIMESTAMP is 'nan'"),
        ("1,2.5,3", "ContextTokens is '2.5', expected a whole number of tokens, 0 to"),
        ("1,-2,3", "ContextTokens is '-2'"),
        ("1,2,", "GeneratedTokens is ''"),
        ("1,2,99999999999", "GeneratedTokens is '99999999999'"),
    ],
)
def test_malformed_azure_rows(tmp_path: Path, row: str, says: str) -> None:
    path = write(tmp_path, f"{HEADER}0,1,1\n\n{row}\n0,1,1\n", "bad.csv")
    with pytest.raises(PlannerError, match=rf"bad\.csv, line 4: {says}"):
        read_trace(path)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "not JSON"),
        ("[1]", r"'\[1\]', expected a JSON object"),
        (mooncake(output_length=...), "no output_length, expected one request"),
        ("{}", "no timestamp and no input_length and no output_length"),
        (mooncake(timestamp="noon"), "timestamp is 'noon', expected a number of milliseconds"),
        (mooncake(timestamp=None), "timestamp is 'None'"),
        (mooncake(timestamp=True), "timestamp is 'True'"),
        (mooncake(timestamp=float("inf")), "timestamp is 'inf'"),
        (mooncake(input_length=1.5), "input_length is '1.5', expected a whole number of tokens"),
        (mooncake(input_length=True), "input_length is 'True'"),
        (mooncake(output_length=-1), "output_length is '-1'"),
        (mooncake(hash_ids=[1]), "1 hash_ids for 600 tokens, expected 2"),
        (mooncake(hash_ids=[1, "x"]), "hash_ids is .*, expected a list of whole numbers"),
        (mooncake(hash_ids=7), "hash_ids is 7, expected a list"),
        (mooncake(hash_ids=...), "a request without hash_ids after one with"),
    ],
)
def test_malformed_mooncake_rows(tmp_path: Path, row: str, says: str) -> None:
    path = write(tmp_path, f"{mooncake()}\n{row}\n", "bad.jsonl")
    with pytest.raises(PlannerError, match=rf"bad\.jsonl, line 2: {says}"):
        read_trace(path)


def test_hash_ids_after_requests_without(tmp_path: Path) -> None:
    path = write(tmp_path, f"{mooncake(hash_ids=...)}\n{mooncake()}\n")
    with pytest.raises(PlannerError, match="line 2: a request with hash_ids after one without"):
        read_trace(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty file; expected an Azure CSV"),
        ("\n \n", "empty file"),
        (HEADER, r"no request that made a token \(0 rows\)"),
        (HEADER + "0,5,0\n", r"no request that made a token \(1 rows\)"),
        ("time,in,out\n1,2,3\n", "starts with 'time,in,out'; expected an Azure CSV"),
        ("[1, 2]", "starts with"),
        (b"\x89PNG\r\n\xff\xfe\x00", "not text"),
        (gzip.compress(b"x" * 999, mtime=0)[:-9], "damaged gzip file"),
        (b"\x1f\x8bnonsense", "damaged gzip file"),
    ],
)
def test_files_that_are_no_trace(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(PlannerError, match=says):
        read_trace(write(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match=r"cannot read trace .*nowhere: No such file"):
        read_trace(tmp_path / "nowhere")
