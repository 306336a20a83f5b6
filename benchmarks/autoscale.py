"""Policies over a day in the simulator, against the best fixed numbers of actors in hindsight.

A day is made of an hour of a public trace (``autoscaler.day`` says how, and what is assumed). The
best fixed numbers are found by simulating them all, the cheapest first; then every policy serves
the same requests, starting from the same numbers. The best fixed numbers of every hour by itself
say how much could be saved at all. Nothing is served for real, and the stage times are a published
system's proportions, not this machine's.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler import registry
from autoscaler.day import CASES, HOUR, Case, Day, make_day
from autoscaler.hindsight import (
    NEARLY,
    Hindsight,
    Timetable,
    best_static,
    best_timetable,
    outcome_data,
    read_outcome,
)
from autoscaler.pooling import sharing
from autoscaler.replay import Outcome, Scenario, figures, run, series
from benchmarks.report import make_report, print_summary, print_table, write_report
from planner.errors import PlannerError
from planner.kept import Kept
from planner.traces import read_trace

POINT = 0.01
"""Attainment below the best static's that still counts as held."""

SAVED = 0.30
"""Share of actor-seconds that is to be saved."""

POLICIES: Mapping[str, Mapping[str, Any]] = {
    "slo_feedback": {},
    "optimal_ratio": {},
    "predictive": {},
}

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Found:
    """A trace's day: what was best in hindsight, and what policies came to."""

    case: Case
    day: Day
    static: Hindsight
    hourly: Timetable
    policies: Mapping[str, Outcome]

    def saved(self, name: str) -> float:
        """Share of the best static's actor-seconds that a policy did without."""
        return self._saved(self.policies[name].actor_seconds)

    @property
    def saved_hourly(self) -> float:
        """Likewise of the best of every hour."""
        return self._saved(self.hourly.actor_seconds)

    def _saved(self, seconds: float) -> float:
        return 1.0 - seconds / self.static.outcome.actor_seconds

    def held(self, name: str) -> bool:
        """Whether a policy's attainment is within a point of the best static's."""
        return self.policies[name].attainment >= self.static.outcome.attainment - POINT

    @property
    def best(self) -> str:
        """The policy with the fewest actor-seconds of those that held, else with the most
        attainment."""
        held = [name for name in self.policies if self.held(name)]
        if held:
            return max(held, key=self.saved)
        return max(self.policies, key=lambda name: self.policies[name].attainment)


def run_days(
    json_path: Path | None = None,
    png_path: Path | None = None,
    *,
    cases: Sequence[str] = (),
    policies: Sequence[str] = (),
    hours: float = 24.0,
    jobs: int | None = None,
    seed: int = 0,
    traces: Path | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the best static and run the policies, for each trace; print, write and draw.

    Args:
        cases: names of ``autoscaler.day.CASES``; none: all.
        policies: names; none: ``POLICIES``, with the parameters there.
        hours: of the day, from midnight; fewer to see it work.
        jobs: processes; None: one per core.
        seed: of the days and of the simulations.
        traces: folder of the recorded traces; None: ../shared/data of the checkout.
        resume: file of finished simulations: those in it are not run again, others are added.
            Delete it when the code of the simulator or of a policy has changed.
        progress: is told what is being done, and the share that is over.

    Returns:
        The report: see ``benchmarks.report``.

    Raises:
        PlannerError: a trace that is not there, or unknown names.
        BadPolicy: no such policy.
    """
    wanted = {name: dict(POLICIES.get(name, {})) for name in policies or POLICIES}
    for name, parameters in wanted.items():
        registry.make(name, parameters)
    unknown = [name for name in cases if name not in CASES]
    if unknown:
        raise PlannerError(f"no day is made of {', '.join(unknown)}; there are {', '.join(CASES)}")
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" if traces is None else traces
    tell = progress or (lambda text, share: None)
    chosen = [CASES[name] for name in cases or CASES]
    found: list[Found] = []
    began = time.monotonic()
    for index, case in enumerate(chosen):
        share = index / len(chosen)

        def say(text: str, part: float, case: Case = case, share: float = share) -> None:
            tell(f"{case.name}: {text}", share + part / len(chosen))

        found.append(_one(case, wanted, folder, hours, jobs, seed, resume, say))
        seconds = time.monotonic() - began
        report = make_report("autoscale", _summary(found, seconds), _details(found))
        # a day takes long: what has been found is not to be lost
        write_report(report, json_path)
        _print(found[-1])
    print_summary(report)
    _draw(png_path if png_path or not json_path else json_path.with_suffix(".png"), found)
    return report


def _one(
    case: Case,
    policies: Mapping[str, Mapping[str, Any]],
    folder: Path,
    hours: float,
    jobs: int | None,
    seed: int,
    resume: Path | None,
    tell: Progress,
) -> Found:
    hour = read_trace(folder / case.file)
    day = make_day(hour, case.speed * hour.rate, seed=seed, hours=hours)
    scenario = case.scenario(day, 1, 1)
    kept = Kept(resume, digest(scenario, seed))

    def searching(text: str, share: float) -> None:
        tell(f"best static, {text}", 0.6 * share)

    def dividing(text: str, share: float) -> None:
        tell(f"best static of every hour, {text}", 0.6 + 0.1 * share)

    static = best_static(scenario, jobs=jobs, seed=seed, progress=searching, kept=kept)
    hourly = best_timetable(
        scenario, HOUR, most=static.most, jobs=jobs, seed=seed, progress=dividing, kept=kept
    )
    # A deployment of the best static's size is what somebody turns a policy on in.
    start = scenario.starting_with(*static.counts)
    tell(", ".join(policies), 0.7)
    units = {name: f"{name} {given} from {static.counts}" for name, given in policies.items()}
    todo = [(name, policies[name]) for name, unit in units.items() if kept.get(unit) is None]
    with sharing((start, seed), jobs) as ask:
        for name, outcome in ask(_policy, todo):
            kept.put(units[name], outcome_data(outcome))
    outcomes = {name: read_outcome(kept.get(unit)) for name, unit in units.items()}
    return Found(case, day, static, hourly, outcomes)


def digest(scenario: Scenario, seed: int) -> str:
    """Of all that decides a simulation, but for the code: requests, system, targets, limits."""
    columns = vars(scenario) | {"trace": None, "cached": None}
    found = hashlib.sha256(repr((columns, seed)).encode())
    trace = scenario.trace
    for column in (trace.arrival, trace.prompt, trace.output, scenario.cached):
        found.update(b"none" if column is None else np.asarray(column).tobytes())
    return found.hexdigest()[:24]


def _policy(
    shared: tuple[Scenario, int], named: tuple[str, Mapping[str, Any]]
) -> tuple[str, Outcome]:
    scenario, seed = shared
    name, parameters = named
    outcome = run(scenario, registry.make(name, parameters), seed=seed)
    # Tens of thousands of ticks that did nothing are not worth their way between processes.
    acted = [decision for decision in outcome.decisions if decision.target is not None]
    return name, replace(outcome, decisions=acted)


def _summary(found: Sequence[Found], seconds: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"seconds": round(seconds, 1), "nearly": NEARLY}
    for one in found:
        key, best, static = one.case.name, one.policies[one.best], one.static
        summary |= {
            f"{key}_requests": best.requests,
            f"{key}_best_static": str(static.counts),
            f"{key}_attainment_most_static": static.most,
            f"{key}_policy": one.best,
            f"{key}_attainment": best.attainment,
            f"{key}_attainment_best_static": static.outcome.attainment,
            f"{key}_actor_seconds": best.actor_seconds,
            f"{key}_actor_seconds_best_static": static.outcome.actor_seconds,
            f"{key}_saved": one.saved(one.best),
            f"{key}_saved_hourly": one.saved_hourly,
            f"{key}_attainment_hourly": one.hourly.attainment,
            f"{key}_changes": best.changes,
            f"{key}_reversals": best.reversals,
        }
        for name, outcome in one.policies.items():
            summary[f"{key}_{name}_attainment"] = outcome.attainment
            summary[f"{key}_{name}_saved"] = one.saved(name)
            summary[f"{key}_{name}_changes"] = outcome.changes
    summary["met"] = all(one.held(one.best) and one.saved(one.best) >= SAVED for one in found)
    return summary


def _details(found: Sequence[Found]) -> dict[str, Any]:
    return {
        one.case.name: {
            "note": one.day.note,
            "system": one.case.cluster(1, 1).latencies.source,
            "slo": vars(one.case.slo),
            "prepare_s": one.case.prepare,
            "best_static": figures(one.static.outcome),
            "tried": {str(counts): share for counts, share in one.static.tried.items()},
            "dropped": len(one.static.dropped),
            "hourly": [str(counts) for counts in one.hourly.counts],
            "policies": {
                name: {
                    **figures(outcome),
                    "parameters": dict(POLICIES.get(name, {})),
                    "reasons": {str(k): v for k, v in outcome.reasons.items()},
                    # without the words of every decision, which are many times as long
                    "changes_made": [
                        f"{one['at']:.0f} s: {one['there']} -> {one['target']}, {one['reasons'][0]}"
                        for one in series(outcome)["changes"]
                    ],
                }
                for name, outcome in one.policies.items()
            },
        }
        for one in found
    }


def _print(one: Found) -> None:
    columns = ("", "attainment", "actor-hours", "saved %", "mean A", "mean F", "changes", "back")
    shown = {f"best static, {one.static.counts}": one.static.outcome, **one.policies}
    rows: list[tuple[Any, ...]] = []
    for name, outcome in shown.items():
        saved = 100 * one.saved(name) if name in one.policies else 0.0
        rows.append(
            (
                name,
                f"{outcome.attainment:.4f}",
                outcome.actor_seconds / 3600,
                saved,
                outcome.attention_seconds / outcome.horizon,
                outcome.ffn_seconds / outcome.horizon,
                outcome.changes,
                outcome.reversals,
            )
        )
    hourly, day = one.hourly, one.static.outcome.horizon
    rows.append(
        (
            "best static of every hour",
            f"{hourly.attainment:.4f}",
            hourly.actor_seconds / 3600,
            100 * one.saved_hourly,
            hourly.period * sum(counts.attention for counts in hourly.counts) / day,
            hourly.period * sum(counts.ffn for counts in hourly.counts) / day,
            len(hourly.counts) - 1,
            "-",
        )
    )
    print_table(f"{one.case.name}: {len(one.day.trace):,} requests; {one.day.note}", columns, rows)


def _draw(path: Path | None, found: Sequence[Found]) -> None:
    if path is None:
        return
    from autoscaler.replay_plots import draw_days

    days = {one.case.name: (one.static.outcome, one.policies) for one in found}
    draw_days(path, "A day in the simulator, made of an hour of each trace", days)
