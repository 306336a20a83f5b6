"""What ``up`` remembers about a deployment on this machine, so that ``down`` stops exactly that.

One small JSON file per deployment in the user's state folder. Not the truth about a running
cluster: that is asked of its manager.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError


class RayRecord(BaseModel):
    """A Ray head that ``up`` started. ``started_at`` (epoch seconds) guards against reused pids."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pid: int
    started_at: float
    folder: str


class Record(BaseModel):
    """A deployment that ``up`` started on this machine."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    address: str
    url: str
    ray: RayRecord | None = None


def state_folder() -> Path:
    """``$XDG_STATE_HOME/afflux``, by default ``~/.local/state/afflux``."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "afflux"


def load(name: str) -> Record | None:
    """The record of a deployment; None when there is none or it can't be read."""
    try:
        return Record.model_validate_json(_file(name).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def save(record: Record) -> None:
    """Write or replace the record of a deployment."""
    file = _file(record.name)
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = file.with_suffix(".draft")
    draft.write_text(record.model_dump_json(indent=2), encoding="utf-8")
    draft.replace(file)


def forget(name: str) -> None:
    """Remove the record of a deployment."""
    _file(name).unlink(missing_ok=True)


def keep_logs(record: Record) -> Path | None:
    """Copy the logs of a Ray of our own aside, since its folder goes; returns where they are."""
    if record.ray is None:
        return None
    logs = Path(record.ray.folder) / "r" / "session_latest" / "logs"
    kept = state_folder() / f"{record.name}-failed-start"
    shutil.rmtree(kept, ignore_errors=True)
    try:
        shutil.copytree(logs, kept)
    except (OSError, shutil.Error):
        return kept if kept.is_dir() else None
    return kept


def _file(name: str) -> Path:
    return state_folder() / f"{name}.json"
