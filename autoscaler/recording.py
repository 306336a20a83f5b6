"""Telemetry in a file: what actors and frontends told, one JSON line per answer.

The first line says what was recorded; the others hold the answers as they came, so that whatever
works on live telemetry works on a file: feed ``Entry.data`` to ``Telemetry.take``. Lines are
written whole and at once, so that a recording that was cut off can be read. Not for asking anybody:
see ``collect``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from autoscaler.recording_lines import KINDS, BadRecording, Entry, Kind, entry_of, parse, plain
from cluster.request_log import Done
from planner.traces import Trace

FORMAT = "afflux-telemetry"
VERSION = 1


class Header(BaseModel):
    """What was recorded. Times of a recording are Unix seconds.

    Args:
        model: name of the model.
        began: when the recording was begun.
        ttft_s, tpot_s, percentile: the deployment's targets.
        lanes: as the spec says, a number or auto.
        layers: MoE layers; top_k, experts: of each. None where unknown.
        slots: most requests that one attention actor runs.
        kv_tokens: context tokens that fit on one attention actor.
        attention, ffn: actors when it began.
        emulated: devices are emulated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["afflux-telemetry"] = "afflux-telemetry"
    version: Literal[1] = 1
    model: str
    began: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    percentile: float = 0.9
    lanes: int | Literal["auto"] = "auto"
    layers: int | None = None
    top_k: int | None = None
    experts: int | None = None
    slots: int | None = None
    kv_tokens: int | None = None
    attention: int | None = None
    ffn: int | None = None
    emulated: bool = False


class Recorder:
    """Writes a recording; a file that has one is continued. Use it as a context manager.

    Args:
        path: of the file.
        header: written when the file is new or empty.

    Raises:
        BadRecording: the file holds something else, or a recording of another model; or it can't
            be written.
    """

    def __init__(self, path: str | PathLike[str], header: Header):
        self.path = Path(path)
        self.lines = 0
        try:
            there = self.path.exists() and self.path.stat().st_size > 0
            if there:
                _check_same(self.path, header)
                _mend(self.path)
            self._file = self.path.open("a", encoding="utf-8")
            if not there:
                self._write(header.model_dump(mode="json"))
        except OSError as error:
            raise BadRecording(f"cannot record to {path}: {error.strerror or error}") from None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the file; idempotent."""
        self._file.close()

    def batch(self, name: str, batch: Mapping[str, Any]) -> None:
        """Write what an actor or frontend told; answers with nothing new in them too, since they
        say that it was idle."""
        data = {key: value for key, value in batch.items() if key not in ("role", "experts")}
        self._entry(KINDS[batch["role"]], batch["unix"], name, data)

    def change(self, at: float, report: Mapping[str, Any]) -> None:
        """Write a change of members that has ended, as plain data."""
        self._entry("change", at, "", report)

    def decision(self, at: float, report: Mapping[str, Any]) -> None:
        """Write a decision of the controller, as plain data."""
        self._entry("decision", at, "", report)

    def _entry(self, kind: Kind, at: float, name: str, data: Mapping[str, Any]) -> None:
        self._write({"kind": kind, "at": at, "name": name, "data": plain(data)})

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        self.lines += 1


def read_header(path: str | PathLike[str]) -> Header:
    """What a recording says of itself.

    Raises:
        BadRecording: see ``entries``.
    """
    with _open(path) as file:
        return _header(path, file.readline())


def entries(path: str | PathLike[str]) -> Iterator[Entry]:
    """The lines of a recording, in the order in which they were written.

    A last line without an end was being written when the recorder was killed, and is left out.

    Raises:
        BadRecording: no recording, another version of the format, or a damaged line; names file
            and line.
    """
    with _open(path) as file:
        _header(path, file.readline())
        for number, text in enumerate(file, start=2):
            if not text.endswith("\n"):
                return
            if text.strip():
                yield entry_of(path, number, text)


def read_requests(path: str | PathLike[str]) -> Trace:
    """The requests of a recording as a trace: arrival, prompt, output.

    Requests that failed, were called off, or had not ended are counted in ``Trace.skipped`` as far
    as they are known of.

    Raises:
        BadRecording: see ``entries``; or it holds no completed request.
    """
    found: dict[tuple[str, str, int], tuple[float, Done]] = {}
    for entry in entries(path):
        if entry.kind != "requests":
            continue
        data = entry.data
        shift = data["unix"] - data["clock"]
        for record in data["events"]:
            if isinstance(record, Done):
                key = entry.name, data["incarnation"], record.number
                found.setdefault(key, (record.arrival + shift, record))
    ended = [
        (arrival, done.prompt, done.output)
        for arrival, done in found.values()
        if done.outcome in ("stop", "length") and done.output > 0
    ]
    if not ended:
        raise BadRecording(
            f"{path}: no request ended while it was recorded; record while requests are served"
        )
    ended.sort()
    arrival, prompt, output = zip(*ended, strict=True)
    return Trace(
        arrival=np.array(arrival) - arrival[0],
        prompt=np.array(prompt, dtype=np.int64),
        output=np.array(output, dtype=np.int64),
        source=str(path),
        skipped=len(found) - len(ended),
    )


def is_recording(path: str | PathLike[str]) -> bool:
    """Whether a file claims to be a recording; False for one that can't be read."""
    try:
        with Path(path).open("rb") as file:
            return FORMAT.encode() in file.read(200)
    except OSError:
        return False


# -- files ---------------------------------------------------------------------------------------


def _open(path: str | PathLike[str]) -> TextIO:
    try:
        return Path(path).open(encoding="utf-8", newline="\n")
    except OSError as error:
        raise BadRecording(f"cannot read {path}: {error.strerror or error}") from None


def _header(path: str | PathLike[str], text: str) -> Header:
    data = parse(path, 1, text)
    if data.get("format") != FORMAT:
        raise BadRecording(
            f'{path}:1: no recording of telemetry; expected a line with "format": "{FORMAT}", as '
            "afflux telemetry record writes it"
        )
    if data.get("version") != VERSION:
        raise BadRecording(
            f"{path}:1: version {data.get('version')!r} of the format; this afflux reads {VERSION}"
        )
    try:
        return Header.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise BadRecording(f"{path}:1: {where}: {problem['msg']}") from None


def _check_same(path: Path, header: Header) -> None:
    there = read_header(path)
    if there.model != header.model:
        raise BadRecording(
            f"{path} is a recording of {there.model}, not of {header.model}; choose another file"
        )


def _mend(path: Path) -> None:
    """Take away a last line that was being written when its recorder was killed."""
    with path.open("rb+") as file:
        end = file.seek(0, 2)
        while end:
            block = min(end, 1 << 16)
            file.seek(end - block)
            found = file.read(block).rfind(b"\n")
            if found >= 0:
                file.truncate(end - block + found + 1)
                return
            end -= block
