"""Read trace files row by row: Azure CSV and Mooncake JSON lines, gzipped or not.

Only the formats: every row is checked, and a bad one is named by file and line. What the rows mean
together is planner/traces.py's job.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from planner.errors import PlannerError
from planner.lengths import MAX_LENGTH

BLOCK_TOKENS = 512
"""Tokens in a block of Mooncake's hash_ids."""

FORMATS = (
    "an Azure CSV (header TIMESTAMP,ContextTokens,GeneratedTokens) or Mooncake JSON lines "
    '({"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]})'
)

COLUMNS = ("timestamp", "contexttokens", "generatedtokens")

GZIP = b"\x1f\x8b"

Blocks = tuple[int, ...] | None
Row = tuple[float, int, int, Blocks]
"""Seconds since some origin, prompt tokens, output tokens, block ids."""


@dataclass
class Rows:
    """The columns of a file, in its order; ``blocks`` is None where no row has any."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    prompt: array[int] = field(default_factory=lambda: array("q"))
    output: array[int] = field(default_factory=lambda: array("q"))
    blocks: list[tuple[int, ...]] | None = None


class BadRow(Exception):
    """What is wrong with a row; the reader adds where it is."""


def read_rows(path: str | PathLike[str], limit: int | None) -> Rows:
    """All rows of a trace, or the first ``limit``.

    Raises:
        PlannerError: the file cannot be read, is in neither format, or holds a malformed row.
    """
    try:
        with _open(Path(path)) as file:
            return _columns(path, islice(_rows(path, file), limit))
    except UnicodeDecodeError:
        raise PlannerError(f"{path}: not text; expected {FORMATS}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise PlannerError(f"{path}: damaged gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise PlannerError(f"cannot read trace {path}: {error.strerror or error}") from None


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        packed = file.read(len(GZIP)) == GZIP
    opener: Any = gzip.open if packed else open
    return opener(path, "rt", encoding="utf-8-sig", newline=None)


def _columns(path: str | PathLike[str], rows: Iterator[tuple[int, Row]]) -> Rows:
    columns = Rows()
    for line, (seconds, prompt, output, blocks) in rows:
        if not columns.seconds:
            columns.blocks = None if blocks is None else []
        if (blocks is None) != (columns.blocks is None):
            first, this = ("without", "with") if blocks is not None else ("with", "without")
            raise PlannerError(
                f"{path}, line {line}: a request {this} hash_ids after one {first}: "
                "expected all or none to have them"
            )
        columns.seconds.append(seconds)
        columns.prompt.append(prompt)
        columns.output.append(output)
        if blocks is not None and columns.blocks is not None:
            columns.blocks.append(blocks)
    return columns


def _rows(path: str | PathLike[str], file: TextIO) -> Iterator[tuple[int, Row]]:
    """Every row with its line number, whichever the format."""
    lines: Iterator[tuple[int, str]] = (
        (number, text) for number, text in enumerate(file, start=1) if text.strip()
    )
    first = next(lines, None)
    if first is None:
        raise PlannerError(f"{path}: empty file; expected {FORMATS}")
    read: Callable[[str], Row]
    if first[1].lstrip().startswith("{"):
        read, lines = _json_row, chain([first], lines)
    else:
        read = _csv_reader(path, first[1])
    for number, text in lines:
        try:
            yield number, read(text)
        except BadRow as bad:
            raise PlannerError(f"{path}, line {number}: {bad}") from None


def _csv_reader(path: str | PathLike[str], header: str) -> Callable[[str], Row]:
    """A reader of the rows under this header."""
    names = [name.strip().lower() for name in next(csv.reader([header]))]
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise PlannerError(f"{path}: starts with {header.strip()[:80]!r}; expected {FORMATS}")
    when, prompt, output = (names.index(name) for name in COLUMNS)

    def read(text: str) -> Row:
        cells = next(csv.reader([text]))
        if len(cells) != len(names):
            raise BadRow(f"{len(cells)} values, expected {len(names)} as in the header")
        return (
            _seconds(cells[when]),
            _tokens("ContextTokens", _integer(cells[prompt])),
            _tokens("GeneratedTokens", _integer(cells[output])),
            None,
        )

    return read


def _seconds(text: str) -> float:
    """ISO 8601 (UTC where no zone is given) or a number of seconds."""
    try:
        when = datetime.fromisoformat(text.strip())
    except ValueError:
        return _finite("TIMESTAMP", text, "a date and time in ISO 8601, or seconds", 1.0)
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return when.timestamp()


def _json_row(text: str) -> Row:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(row, dict):
        raise BadRow(f"{text.strip()[:40]!r}, expected a JSON object")
    missing = [name for name in ("timestamp", "input_length", "output_length") if name not in row]
    if missing:
        raise BadRow(f"no {' and no '.join(missing)}, expected one request of Mooncake JSON lines")
    prompt = _tokens("input_length", row["input_length"])
    return (
        _finite("timestamp", row["timestamp"], "a number of milliseconds", 1e-3),
        prompt,
        _tokens("output_length", row["output_length"]),
        _blocks(row.get("hash_ids"), prompt),
    )


def _blocks(ids: Any, prompt: int) -> Blocks:
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(block) is int for block in ids):
        raise BadRow(f"hash_ids is {str(ids)[:40]}, expected a list of whole numbers")
    expected = -(-prompt // BLOCK_TOKENS)
    if len(ids) != expected:
        raise BadRow(
            f"{len(ids)} hash_ids for {prompt} tokens, expected {expected} "
            f"(one per {BLOCK_TOKENS} tokens)"
        )
    return tuple(ids)


def _finite(name: str, value: Any, expected: str, unit: float) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} is {str(value)[:40]!r}, expected {expected}")
    return number * unit


def _integer(text: str) -> int | str:
    """The number, or the text itself where there is none, for the error to show."""
    try:
        return int(text)
    except ValueError:
        return text


def _tokens(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_LENGTH:
        raise BadRow(
            f"{name} is {str(value)[:40]!r}, expected a whole number of tokens, 0 to {MAX_LENGTH}"
        )
    return value
