"""Points as plain data and back, and a file of finished work that a search goes on from.

One JSON object per line, keyed by a digest of all that was asked: lines of other questions are left
alone. A line that was cut off when the search was is computed again. Not for reports.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.explore.kernels.base import Provenance
from planner.explore.points import Group, Mode, Point
from planner.explore.question import Question

FORMAT = 1


def point_data(point: Point) -> dict[str, Any]:
    """For JSON."""
    return vars(point) | {
        "mode": point.mode.value,
        "groups": [vars(group) for group in point.groups],
        "shares": {source.value: share for source, share in point.shares.items()},
    }


def read_point(data: Mapping[str, Any]) -> Point:
    """What ``point_data`` wrote."""
    changed = {
        "mode": Mode(data["mode"]),
        "groups": tuple(Group(**group) for group in data["groups"]),
        "shares": {Provenance(key): value for key, value in data["shares"].items()},
    }
    return Point(**{**data, **changed})


def digest(question: Question, *sources: str) -> str:
    """Of all that decides the answer: the question, and the names of the kernel times."""
    text = repr((FORMAT, question, sources))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Kept:
    """Finished units of one question, on disk.

    Args:
        path: of the file; made where it isn't there; None: nothing is kept.
        key: ``digest`` of the question.

    Raises:
        PlannerError: the file can't be read or written.
    """

    def __init__(self, path: Path | None, key: str):
        self._path, self._key = path, key
        self._done: dict[str, Any] = {}
        if path is None:
            return
        try:
            lines = path.read_text().splitlines() if path.exists() else []
            with path.open("a") as file:
                if lines and not _reads(lines[-1]):
                    file.write("\n")  # what was cut off stays a line of its own
        except OSError as error:
            raise PlannerError(
                f"{path} can't hold the finished work ({error.strerror}): give a file to write to"
            ) from None
        for line in lines:
            data = _reads(line)
            if isinstance(data, dict) and data.get("key") == key and "unit" in data:
                self._done[data["unit"]] = data.get("found")

    def get(self, unit: str) -> Any:
        """What was found in a unit of work; None where it isn't finished."""
        return self._done.get(unit)

    def put(self, unit: str, found: Any) -> None:
        """Keeps what was found, plain data."""
        self._done[unit] = found
        if self._path is not None:
            line = json.dumps({"key": self._key, "unit": unit, "found": found})
            with self._path.open("a") as file:
                file.write(line + "\n")


def _reads(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
