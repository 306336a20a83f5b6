"""Prometheus's own opinion of our configuration, rules, alerts and expressions, by ``promtool``.

Where it is installed (Debian: ``apt install prometheus``); ``promql`` knows the grammar without it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dashboards import rules

HOW_TO_GET_IT = "promtool is not installed; on Debian or Ubuntu: apt install prometheus"

_TIMEOUT_S = 240.0


def find() -> str | None:
    """Its path; None where it is not installed."""
    return shutil.which("promtool")


def problems(expressions: Iterable[str]) -> list[str]:
    """What promtool says against prometheus.yml, the rules, their tests, and ``expressions``.

    Raises:
        FileNotFoundError: it is not installed.
    """
    tool = find()
    if tool is None:
        raise FileNotFoundError(HOW_TO_GET_IT)
    place = rules.folder()
    tests = sorted(str(file) for file in (place / "tests").glob("*.test.yml"))
    found = [
        *_run(tool, "check", "config", str(place / "prometheus.yml")),
        *_run(tool, "test", "rules", *tests),
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "expressions.yml"
        one_each = [
            {"record": f"expression_{number}", "expr": expression}
            for number, expression in enumerate(dict.fromkeys(expressions))
        ]
        file.write_text(json.dumps({"groups": [{"name": "all", "rules": one_each}]}))
        found += _run(tool, "check", "rules", str(file))
    return found


def _run(*command: str) -> Sequence[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode == 0:
        return ()
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return [f"promtool {' '.join(command[1:3])}: {line.strip()}" for line in said if line.strip()]
