"""Measurements as samples: telemetry rows, JSONL files, the JSON of the decode benchmark.

Reads and checks, and knows what the benchmark's figures mean; fitting them is ``fitting``'s job.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.latency import STAGES

_QUIET_SHARE = 0.1
_WIRE_PARTS = ("queue", "boarding", "reply")


@dataclass(frozen=True)
class Sample:
    """One measurement: of a stage in a lane, through all layers, or of a whole step."""

    stage: str
    seconds: float
    load: float | None  # tokens for attention and step, requests for ffn and transfer
    requests: float | None = None
    lanes: int = 1
    count: int = 1  # measurements that it is the median of


def read_telemetry(path: str | Path) -> Iterator[Mapping[str, Any]]:
    """Rows of a JSONL file for ``latencies_from_telemetry``; empty lines are skipped.

    Raises:
        PlannerError: the file can't be read, or a line is not a JSON object; names file and line.
    """
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise PlannerError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise PlannerError(
                f"{path}:{number}: found {type(row).__name__}, expected a JSON object"
            )
        yield row


def read_row(number: int, row: Mapping[str, Any]) -> Sample:
    """A telemetry row, as ``fitting.latencies_from_telemetry`` describes it.

    Args:
        number: of the row, for errors.

    Raises:
        PlannerError: a key is missing, or its value makes no sense; names row and key.
    """

    def get(key: str, default: float | None) -> float | None:
        value = row.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise PlannerError(f"row {number}: {key} is {value!r}, expected a number")
        if not math.isfinite(value) or value < 0 or (value == 0 and key != "load"):
            raise PlannerError(f"row {number}: {key} is {value!r}, expected more than 0")
        if key in ("lanes", "layers") and value != int(value):
            raise PlannerError(f"row {number}: {key} is {value!r}, expected a whole number")
        return float(value)

    stage = row.get("stage")
    if stage not in (*STAGES, "step"):
        raise PlannerError(
            f"row {number}: stage is {stage!r}, expected one of {', '.join((*STAGES, 'step'))}"
        )
    seconds, layers, lanes = get("seconds", None), get("layers", 1.0), get("lanes", 1.0)
    load, requests = get("load", None), get("requests", None)
    if seconds is None or (load is None and requests is None):
        raise PlannerError(f"row {number}: has no {'load' if seconds else 'seconds'}")
    if stage == "step" and requests is None:
        raise PlannerError(f"row {number}: a step needs its requests")
    if stage in ("ffn", "transfer", "prefill") and load is None:
        raise PlannerError(f"row {number}: a row of stage {stage!r} needs its load")
    return Sample(str(stage), seconds * (layers or 1.0), load, requests, int(lanes or 1))


def model_entry(path: str | Path, model: str | None) -> tuple[str, Mapping[str, Any]]:
    """Name and entry of a model in a report of the decode benchmark.

    Raises:
        PlannerError: not such a report, or no such model in it.
    """
    try:
        details = json.loads(_text(path))["details"]
        models = {key: entry for key, entry in details.items() if "rows" in entry}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, PlannerError):
            raise
        raise PlannerError(
            f"{path}: expected the JSON that `afflux bench decode` writes ({error!r})"
        ) from error
    if model is None and len(models) == 1:
        return next(iter(models.items()))
    if model is None or model not in models:
        raise PlannerError(
            f"{path}: model is {model!r}, expected one of {', '.join(models) or '(none there)'}"
        )
    return model, models[model]


def benchmark_samples(
    rows: Sequence[Mapping[str, Any]], layers: int
) -> tuple[list[Sample], list[str]]:
    """Samples of a model's rows in a report of the decode benchmark, and what to know of them.

    Rows hold running totals of one engine, so only what changed from row to row counts.

    Raises:
        LookupError, TypeError, ValueError: the rows are not those of the benchmark.
    """
    engine, _ = Counter(row["best_split"] for row in rows).most_common(1)[0]
    rows = [row for row in rows if row["best_split"] == engine]
    samples: list[Sample] = []
    for before, row in pairwise([None, *rows]):
        assert row is not None
        batch, lanes = float(row["batch"]), int(row["lanes"])
        for stage in ("attention", "ffn"):
            old = before["stage_seconds"][stage] if before else []
            for point in row["stage_seconds"][stage]:
                if point in old:
                    continue
                load, seconds = (float(value) for value in point)
                # more tokens than requests: prompts, whose attention is another
                if stage == "ffn":
                    samples.append(Sample("ffn", seconds * layers, load))
                elif load <= batch:
                    samples.append(Sample(stage, seconds * layers, None, load))
                else:
                    samples.append(Sample("prefill", seconds * layers, load))
        wire = _wire_seconds(row["hops"], before["hops"] if before else {})
        samples.append(Sample("transfer", wire * layers, batch / lanes))
        seconds = float(row["step_ms"][engine]) / 1e3
        samples.append(Sample("step", seconds, None, batch, lanes))
    return samples, [
        f"steps of {engine!r}, with the number of lanes its chooser took most often",
        "transfer is the quietest tenth of the hops at the batch, the less disturbed way twice",
        "prefill is the attention side's part of a chunk; the experts' part is that of ffn",
    ]


def _wire_seconds(hops: Mapping[str, Any], before: Mapping[str, Any]) -> float:
    """Transfer time of a hop, both ways, from histograms that run on from row to row.

    A hop's wire times hold waits too: for the FFN to be free on the way out, for the lane's turn on
    the way back. So it is the least decile, and twice the way that waited less: both ways carry
    about as many bytes.
    """
    slowest = 0.0
    for peer, parts in hops.items():
        quiet = {
            part: _quantile_us(parts[part]["buckets"], before.get(peer, {}).get(part, {}))
            for part in (*_WIRE_PARTS, "wire_out", "wire_back")
        }
        ways = 2 * min(quiet["wire_out"], quiet["wire_back"])
        slowest = max(slowest, ways + sum(quiet[part] for part in _WIRE_PARTS))
    return slowest * 1e-6


def _quantile_us(buckets: Mapping[str, int], before: Mapping[str, Any]) -> float:
    old = before.get("buckets", {})
    new = {float(edge): count - old.get(edge, 0) for edge, count in buckets.items()}
    edges = sorted(edge for edge, count in new.items() if count > 0)
    total = np.cumsum([new[edge] for edge in edges])
    return edges[int(np.searchsorted(total, _QUIET_SHARE * total[-1]))]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise PlannerError(f"{path}: can't be read ({reason})") from error
