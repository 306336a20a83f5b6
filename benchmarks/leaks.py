"""Whether processes grow and things stay behind: snapshots of a deployment, and their difference.

Resident memory, open files and threads of every process that lives through all snapshots; names in
/dev/shm; Ray's placement groups. Meant for a machine that does nothing else: shared memory has no
owner's name on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil


@dataclass(frozen=True)
class Process:
    """One process at one time."""

    name: str
    rss_bytes: int
    files: int
    threads: int


@dataclass(frozen=True)
class Snapshot:
    """A deployment at one time; processes by (pid, start time)."""

    processes: dict[tuple[int, float], Process]
    shared_memory: frozenset[str]
    groups: int


def snapshot(processes: Sequence[psutil.Process], deployment: str) -> Snapshot:
    """Look at ``processes`` and at the rest. This process must be connected to Ray."""
    import ray

    prefix = f"{deployment}:"
    found = {}
    for process in processes:
        with suppress(psutil.Error), process.oneshot():
            words = process.cmdline() or [process.name()]
            found[process.pid, process.create_time()] = Process(
                name=_short(words),
                rss_bytes=process.memory_info().rss,
                files=process.num_fds(),
                threads=process.num_threads(),
            )
    groups = ray.util.placement_group_table().values()
    alive = [g for g in groups if g["name"].startswith(prefix) and g["state"] != "REMOVED"]
    return Snapshot(found, frozenset(_shared_memory()), len(alive))


def growth(snapshots: Sequence[Snapshot]) -> dict[str, Any]:
    """What grew from the first to the last snapshot.

    Memory is the difference between the medians of the last and the first third, so that a single
    sample does not decide.

    Returns:
        ``rss_mib``: the most that one process grew; ``files``, ``threads``: likewise; ``shm``:
        names in /dev/shm that are new and still there; ``groups``: placement groups more than at
        first; ``processes``: a row per process.
    """
    if len(snapshots) < 2:
        raise ValueError(f"{len(snapshots)} snapshots; expected at least 2")
    third = max(1, len(snapshots) // 3)
    first, last = snapshots[:third], snapshots[-third:]
    lasting = set.intersection(*(set(snap.processes) for snap in snapshots))
    rows: list[dict[str, Any]] = []
    for key in sorted(lasting):
        before = _median([snap.processes[key].rss_bytes for snap in first])
        after = _median([snap.processes[key].rss_bytes for snap in last])
        one, other = snapshots[0].processes[key], snapshots[-1].processes[key]
        rows.append(
            {
                "name": other.name,
                "pid": key[0],
                "rss_mib": round(after / 2**20, 1),
                "grown_mib": round((after - before) / 2**20, 2),
                "files": other.files - one.files,
                "threads": other.threads - one.threads,
            }
        )
    return {
        "rss_mib": max((row["grown_mib"] for row in rows), default=0.0),
        "files": max((row["files"] for row in rows), default=0),
        "threads": max((row["threads"] for row in rows), default=0),
        "shm": len(snapshots[-1].shared_memory - snapshots[0].shared_memory),
        "groups": snapshots[-1].groups - snapshots[0].groups,
        "processes": rows,
    }


def _median(values: Sequence[int]) -> float:
    return float(np.median(values))


def _shared_memory() -> list[str]:
    try:
        return [entry.name for entry in Path("/dev/shm").iterdir()]
    except OSError:
        return []


def _short(words: Sequence[str]) -> str:
    """``ray::FFNActor.serve`` or the program's name."""
    program = words[0].split()[0]
    if program.startswith("ray::"):
        return program
    name = Path(program).name
    module = next((Path(w).stem for w in words[1:] if w.endswith(".py")), "")
    return f"{name} {module}".strip()
