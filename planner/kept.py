"""A file of finished work that a long job goes on from.

One JSON object per line, keyed by a digest of all that was asked: lines of other questions are left
alone. A line that was cut off when the job was is computed again. Not for reports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.errors import PlannerError


class Kept:
    """Finished units of one job, on disk.

    Args:
        path: of the file; made where it isn't there; None: nothing is kept.
        key: a digest of all that decides the answer.

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
