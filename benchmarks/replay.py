"""The simulator beside the live system: runs of ``bench decode`` replayed with fitted coefficients.

Latencies are fitted to the stage times and steps that the benchmark recorded one setting at a time
(``samples``). What is replayed are other runs: requests that come at once, prompts included, with
answers of different lengths, so that the batch shrinks. Nothing of those runs is fitted.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import print_table
from planner.fitting import FitReport, latencies_from_benchmark
from planner.loads import Arrival, Arrivals
from planner.simulator import Cluster, simulate

PREFILL_TOKENS = 2048
"""Tokens of a step at most, as ``benchmarks.decode`` sets it."""


@dataclass(frozen=True)
class Replayed:
    """One setting, measured (median of its repetitions) and simulated; seconds and tokens/s."""

    model: str
    batch: int
    lanes: int
    throughput: float
    simulated_throughput: float
    tpot_p50: float
    simulated_tpot_p50: float
    tpot_p90: float
    simulated_tpot_p90: float

    def errors(self) -> dict[str, float]:
        """Relative errors of the simulation, above 0 where it says more."""
        return {
            "throughput": self.simulated_throughput / self.throughput - 1,
            "tpot_p50": self.simulated_tpot_p50 / self.tpot_p50 - 1,
            "tpot_p90": self.simulated_tpot_p90 / self.tpot_p90 - 1,
        }


def replay(path: Path) -> tuple[list[Replayed], dict[str, FitReport]]:
    """Every run that a report of ``afflux bench decode`` holds, and how well each model was fitted.

    Raises:
        PlannerError: not such a report, or nothing can be fitted to it.
        ValueError: it holds no runs, as those of an older benchmark.
    """
    rows: list[Replayed] = []
    reports: dict[str, FitReport] = {}
    for model, entry in json.loads(path.read_text(encoding="utf-8"))["details"].items():
        if "runs" not in entry:
            continue
        _, reports[model] = latencies_from_benchmark(path, model)
        settings: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for run in entry["runs"]:
            settings[run["batch"], run["lanes"]].append(run)
        rows += [
            _replayed(model, reports[model], entry["layers"], runs) for runs in settings.values()
        ]
    if not rows:
        raise ValueError(f"{path} holds no runs to replay; make it anew: afflux bench decode")
    return rows, reports


def summary(rows: Sequence[Replayed]) -> dict[str, float]:
    """Greatest and median |relative error| by figure."""
    found: dict[str, float] = {}
    for figure in ("throughput", "tpot_p50", "tpot_p90"):
        errors = [abs(row.errors()[figure]) for row in rows]
        found[f"simulated_{figure}_max_error"] = round(max(errors), 4)
        found[f"simulated_{figure}_median_error"] = round(statistics.median(errors), 4)
    return found


def details(rows: Sequence[Replayed]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [{**asdict(row), "errors": row.errors()} for row in rows]


def print_rows(rows: Sequence[Replayed]) -> None:
    """A table on the terminal."""
    print_table(
        "measured → simulated with fitted coefficients",
        ("model", "batch", "lanes", "tokens/s", "TPOT p50 ms", "TPOT p90 ms"),
        [
            (
                row.model,
                row.batch,
                row.lanes,
                _beside(row.throughput, row.simulated_throughput, 0),
                _beside(row.tpot_p50 * 1e3, row.simulated_tpot_p50 * 1e3, 1),
                _beside(row.tpot_p90 * 1e3, row.simulated_tpot_p90 * 1e3, 1),
            )
            for row in rows
        ],
    )


def _beside(measured: float, simulated: float, digits: int) -> str:
    return f"{measured:.{digits}f} → {simulated:.{digits}f} {simulated / measured - 1:+.0%}"


def _replayed(
    model: str, report: FitReport, layers: int, runs: Sequence[dict[str, Any]]
) -> Replayed:
    run = runs[0]
    batch, lanes, outputs = run["batch"], run["lanes"], run["outputs"]
    cluster = Cluster(
        report.joint,
        attention=1,
        batch=-(-batch // lanes),
        lanes=lanes,
        boarding="asynchronous",
        steps="joint",
        layers=layers,
        prefill="colocated",
        prefill_chunk=PREFILL_TOKENS // lanes,
    )
    arrivals = [Arrival(0.0, run["prompt"], output) for output in outputs]
    result = simulate(cluster, Arrivals(arrivals, unit="s"))
    return Replayed(
        model=model,
        batch=batch,
        lanes=lanes,
        throughput=sum(outputs) / statistics.median(one["seconds"] for one in runs),
        simulated_throughput=sum(outputs) / result.makespan,
        tpot_p50=statistics.median(one["tpot_p50_s"] for one in runs),
        simulated_tpot_p50=result.tpot.p50,
        tpot_p90=statistics.median(one["tpot_p90_s"] for one in runs),
        simulated_tpot_p90=result.tpot.p90,
    )
