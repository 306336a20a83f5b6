"""The lines of a recording of telemetry: entries to JSON and back, checked. No files here: see
``recording``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from actors.errors import AffluxError
from cluster.request_log import Done, First

Kind = Literal["steps", "rides", "requests", "change", "decision"]
KINDS: Mapping[str, Kind] = {"attention": "steps", "ffn": "rides", "frontend": "requests"}
_ARRAYS = ("steps", "bins")
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "steps": ("incarnation", "clock", "unix", "number", "columns", "steps"),
    "rides": ("incarnation", "clock", "unix", "columns", "bins"),
    "requests": ("incarnation", "clock", "unix", "number", "events"),
    "change": (),
    "decision": (),
}


class BadRecording(AffluxError):
    """A file that is no recording, or a line that is damaged; says where."""

    code = "bad_recording"


class Entry(NamedTuple):
    """A line of a recording.

    ``at`` is Unix time; ``name`` who told (empty for changes and decisions); ``data`` is the
    answer as it was given, arrays and records restored.
    """

    line: int
    kind: Kind
    at: float
    name: str
    data: dict[str, Any]


def entry_of(path: str | PathLike[str], number: int, text: str) -> Entry:
    """A line of ``path`` as an entry; raises BadRecording, which names file and line."""
    line = parse(path, number, text)
    kind: Any = line.get("kind")
    at: Any = line.get("at")
    name: Any = line.get("name")
    data = line.get("data")
    if kind not in get_args(Kind):
        raise BadRecording(
            f"{path}:{number}: kind is {kind!r}, expected one of {', '.join(get_args(Kind))}"
        )
    good = isinstance(at, int | float) and math.isfinite(at) and isinstance(name, str)
    if not good or not isinstance(data, dict):
        raise BadRecording(
            f"{path}:{number}: expected at (a number), name (text) and data (an object)"
        )
    missing = [key for key in _NEEDED[kind] if key not in data]
    if missing:
        raise BadRecording(f"{path}:{number}: {kind} lack {', '.join(missing)}")
    try:
        return Entry(number, kind, at, name, _restored(kind, data))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise BadRecording(f"{path}:{number}: {kind} are damaged: {error}") from None


def parse(path: str | PathLike[str], number: int, text: str) -> dict[str, Any]:
    """The object on a line; raises BadRecording."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRecording(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadRecording(f"{path}:{number}: expected an object, found {type(found).__name__}")
    return found


def plain(data: Any) -> Any:
    """As JSON has it; numbers that are none become null."""
    if isinstance(data, First | Done):
        return [type(data).__name__, *map(plain, data)]
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, np.ndarray):
        return plain(data.tolist())
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, np.generic):
        return plain(data.item())
    if isinstance(data, float):
        # Microseconds are kept: a monotonic clock may have been going for years.
        return round(data, 9) if math.isfinite(data) else None
    return data


def _restored(kind: Kind, data: dict[str, Any]) -> dict[str, Any]:
    if kind in ("change", "decision"):
        return data
    role = {made: role for role, made in KINDS.items()}[kind]
    found = {**data, "role": role}
    for key in _ARRAYS:
        if key in data:
            found[key] = np.array(data[key], dtype=np.float64).reshape(-1, len(data["columns"]))
    if kind == "requests":
        found["events"] = [_record(*record) for record in data["events"]]
        found["gaps"] = {int(gap): count for gap, count in data.get("gaps", {}).items()}
    return found


def _record(name: str, *values: Any) -> First | Done:
    if name == "First":
        return First(*values)
    if name == "Done":
        return Done(*values)
    raise ValueError(f"{name!r} is neither First nor Done")
