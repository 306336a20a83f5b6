"""How ``afflux simulate`` shows a run: tables, JSON, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from afflux.planning import many, number, one, percent, print_rows, say
from afflux.simulate import setting_of, theory

if TYPE_CHECKING:
    from rich.console import Console

    from afflux.simulate import Run
    from planner.plots import Best, RatioLine, Series
    from planner.records import Result

TIMES = ("ttft", "tpot", "itl", "e2e")
_NAMES = {
    "ttft": "first token",
    "tpot": "per token of a request",
    "itl": "between two tokens",
    "e2e": "whole request",
}


def show(console: Console, run: Run, result: Result) -> None:
    """All tables."""
    cluster, unit = run.cluster, result.unit
    per = f"tokens/{one(unit)}"
    say(
        console,
        f"{'size':<10}{name(run)}: {many(cluster.lanes, 'lane')} of {cluster.batch} slots per "
        f"attention worker, {cluster.boarding} boarding",
    )
    say(console, f"{'load':<10}{run.text}")
    rows = [
        ("throughput", f"{number(result.throughput)} {per}"),
        ("per instance", f"{number(result.per_instance)} {per}"),
    ]
    expected = _expected(run, result)
    if expected is not None:
        off = 100 * (result.per_instance / expected - 1)
        rows.append(("barrier-aware theory", f"{number(expected)} {per} ({off:+.1f} % simulated)"))
    rows += [
        ("attention idle", percent(result.idle_attention)),
        ("FFN idle", percent(result.idle_ffn)),
        ("step of a lane", f"{number(result.step_time)} {unit}"),
        ("requests completed", f"{result.completed:,} of {result.arrived:,} that arrived"),
    ]
    for label, count in (
        ("rejected", result.rejected),
        ("in flight at the end", result.in_flight),
        ("replayed", result.replayed),
    ):
        if count:
            rows.append((label, f"{count:,}"))
    rows.append(("simulated time", f"{number(result.makespan)} {unit}, {result.steps:,} steps"))
    print_rows(console, "Result", ("", ""), rows, left=("",))
    _print_times(console, result)
    for at, what in result.changes:
        say(console, f"at {number(at)} {unit}: {what}")


def _print_times(console: Console, result: Result) -> None:
    rows = []
    for key in TIMES:
        found = getattr(result, key)
        if found.count:
            cells = (found.mean, found.p50, found.p90, found.p99, found.most)
            rows.append((_NAMES[key], *(number(cell) for cell in cells)))
    if rows:
        columns = ("time to or between tokens", "mean", "P50", "P90", "P99", "most")
        print_rows(console, f"Latencies, {result.unit}", columns, rows)


def _expected(run: Run, result: Result) -> float | None:
    """What the theory says per instance, where it is about the same thing."""
    steady = run.closed and not result.changes and run.cluster.boarding == "barrier"
    if not steady or run.cluster.prefill != "none" or run.cluster.layers > 1:
        return None
    return theory(run.cluster, run.workload).per_instance


def name(run: Run) -> str:
    """``8A1F``."""
    return f"{run.cluster.attention}A{run.cluster.ffn}F"


def summary(run: Run, result: Result) -> dict[str, Any]:
    """The flat figures of the JSON."""
    cluster = run.cluster
    figures: dict[str, Any] = {
        "workload": run.workload.name,
        "latencies": cluster.latencies.source,
        "unit": result.unit,
        "load": run.text,
        "boarding": cluster.boarding,
        "batch": cluster.batch,
        "lanes": cluster.lanes,
        "theory_per_instance": _expected(run, result),
    }
    for key in (
        "attention", "ffn", "throughput", "per_instance", "idle_attention", "idle_ffn",
        "idle_attention_run", "idle_ffn_run", "window", "makespan", "steps", "calls", "step_time",
        "arrived", "completed", "rejected", "in_flight", "replayed", "tokens", "theta", "nu2",
        "attention_left", "ffn_left",
    ):  # fmt: skip
        figures[key] = getattr(result, key)
    for key in TIMES:
        found = getattr(result, key)
        for quantile in ("mean", "p50", "p90", "p99"):
            figures[f"{key}_{quantile}"] = getattr(found, quantile)
    return figures


def details(run: Run, result: Result) -> dict[str, Any]:
    """All the rest of the JSON."""
    return {
        **{key: asdict(getattr(result, key)) for key in TIMES},
        "series": asdict(result.series),
        "changes": [{"at": at, "what": what} for at, what in result.changes],
    }


def draw(path: Path, run: Run, result: Result) -> None:
    """A few steps, and beside the barrier-aware theory what it came to; over time instead, if there
    were arrivals or changes."""
    from planner.plots import draw_run, draw_sizing

    title = f"{name(run)}: {run.workload.name} on {run.cluster.latencies.source or 'no name'}"
    steps = f"Steps of {name(run)}, simulated"
    if not run.closed or result.changes:
        options = {"unit": result.unit, "steps_title": steps}
        draw_run(path, title, _series(run, result), result.spans, result.changes, **options)
        return
    lines, marks = _beside_theory(run, result)
    draw_sizing(path, title, lines, marks, result.spans, unit=result.unit, steps_title=steps)


def _beside_theory(run: Run, result: Result) -> tuple[list[RatioLine], list[Best]]:
    from planner.plots import Best, RatioLine
    from planner.points import points
    from planner.sizing import optimum

    setting, ffn = setting_of(run.cluster, run.workload), run.cluster.ffn
    best = optimum(setting, ffn=ffn)
    here = result.attention / ffn
    grid = np.geomspace(min(here, best.ratio) / 4, max(here, best.ratio) * 4, 240)
    at = points(setting, grid * ffn, ffn)
    line = RatioLine(
        f"barrier-aware theory, {many(run.cluster.lanes, 'lane')}",
        grid.tolist(),
        at.per_instance.tolist(),
        at.idle_attention.tolist(),
        at.idle_ffn.tolist(),
    )
    dot = RatioLine(
        "this run",
        [here],
        [result.per_instance],
        [result.idle_attention],
        [result.idle_ffn],
        simulated=True,
    )
    return [line, dot], [Best("r* =", best.ratio, best.point.per_instance, line.name)]


def _series(run: Run, result: Result) -> list[Series]:
    from planner.plots import Series

    found, unit = result.series, one(result.unit)

    def rate(counts: Sequence[int]) -> list[float]:
        return [count / found.width for count in counts]

    tokens = Series(f"tokens/{unit}", found.times, {"tokens": rate(found.tokens)})
    counts = {"attention": found.attention, "FFN": found.ffn}
    workers = Series("workers", found.times, counts, steps=True)
    if run.closed:  # arrivals and completions are one there, and all slots are full
        return [tokens, workers]
    flow = {"arrived": rate(found.arrived), "completed": rate(found.completed)}
    held = {"running": found.running, "waiting": found.waiting}
    return [
        tokens,
        Series(f"requests/{unit}", found.times, flow),
        Series("requests", found.times, held),
        workers,
    ]
