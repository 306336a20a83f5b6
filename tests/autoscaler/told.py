"""Batches as actors and frontends tell them, for tests; times on a clock that is theirs alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.telemetry import RIDE_COLUMNS, STEP_COLUMNS
from cluster.request_log import Record

AHEAD = 1000.0
"""How far every sender's clock is ahead of ours."""


def row(at: float, **values: float) -> list[float]:
    """A step that ended at ``at`` (our clock)."""
    usual = {"step": 0.1, "compute": 0.06, "wait": 0.04, "lanes": 2.0, "tokens": 8.0}
    usual |= {"requests": 8.0, "decoding": 8.0, "context": 800.0, "epoch": 1.0}
    known = {**usual, **values, "at": at + AHEAD}
    return [known.get(column, 0.0) for column in STEP_COLUMNS]


def attention(
    at: float, rows: Sequence[Sequence[float]] = (), number: int | None = None, **facts: Any
) -> dict[str, Any]:
    """What an attention actor tells at ``at``; its first step was long ago."""
    return {
        "role": "attention",
        "incarnation": "a",
        "clock": at + AHEAD,
        "unix": at,
        "number": len(rows) + 100 if number is None else number,
        "missed": 0,
        "began": AHEAD - 500.0,
        "columns": STEP_COLUMNS,
        "steps": np.array(rows, dtype=np.float64).reshape(-1, len(STEP_COLUMNS)),
        "running": 4,
        "waiting": 1,
        "kv_usage": 0.5,
        "kv_tokens": 4096,
        "slots": 32,
        "layer_count": 3,
        "wire": None,
        **facts,
    }


def ffn(at: float, rides: int = 0, busy_s: float = 0.0, **facts: Any) -> dict[str, Any]:
    """What an FFN actor tells at ``at``: 100 pairs a ride."""
    bins = [[26.0, rides, 100.0 * rides, 1e4 * rides, busy_s, busy_s, 100.0 * busy_s, rides]]
    return {
        "role": "ffn",
        "incarnation": "f",
        "clock": at + AHEAD,
        "unix": at,
        "number": rides,
        "missed": 0,
        "began": AHEAD - 500.0,
        "columns": RIDE_COLUMNS,
        "bins": np.array(bins if rides else []).reshape(-1, len(RIDE_COLUMNS)),
        "rides": rides,
        "frames": rides,
        "tokens": rides,
        "pairs": 100 * rides,
        "busy_s": busy_s,
        "idle_s": 0.0,
        "boarding_s": 0.0,
        "queued": 0,
        "experts": {0: [1, 2]},
        **facts,
    }


def frontend(at: float, events: Sequence[Record] = (), **facts: Any) -> dict[str, Any]:
    """What a frontend reports at ``at``; the times in ``events`` are on its clock."""
    return {
        "role": "frontend",
        "incarnation": "d",
        "clock": at + AHEAD,
        "unix": at,
        "number": events[-1].number if events else 0,
        "missed": 0,
        "events": list(events),
        "waits": [],
        "paces": [],
        "arrived": 0,
        "rejected": 0,
        "tokens": 0,
        "replays": 0,
        "gaps": {},
        "running": 0,
        "waiting": 0,
        **facts,
    }
