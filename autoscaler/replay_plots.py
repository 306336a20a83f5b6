"""Pictures of replays: what came, what the targets saw, how many workers there were, and why.

Attention is blue and the FFN side orange, as everywhere. Everything here draws what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoscaler.policy import SLO, Decision
from autoscaler.replay import Outcome
from autoscaler.tune import Trial
from planner.plots import ATTENTION, CHOSEN, EVENT, FFN, SIMULATION, TRANSFER, picture
from planner.staff import Staff

_REASONS = ("#7a4fa3", "#2a8c7c", "#b3202c", "#8c6d1f", "#555555", "#c45ab3", "#1f8ca0", "#9a9a9a")
_HOUR = 3600.0


def draw_replay(path: Path, title: str, outcome: Outcome, slo: SLO, unit: str = "s") -> None:
    """Rate, both latencies beside their targets, workers, and every change with its reason.

    Args:
        path: PNG, SVG or PDF by its ending; parent folders are made.
        unit: of time; days and hours are drawn in hours.

    Raises:
        PlannerError: the file cannot be written.
    """
    scale, name = (_HOUR, "h") if unit == "s" and outcome.horizon > 2 * _HOUR else (1.0, unit)
    times = [window.at / scale for window in outcome.windows]
    with picture(path, title, 8.2) as figure:
        rate, ttft, tpot, workers, why = figure.subplots(
            5, 1, sharex=True, height_ratios=(1, 1.1, 1.1, 1.5, 0.9)
        )
        rate.step(times, [w.rate for w in outcome.windows], where="post", color=TRANSFER, lw=1)
        rate.set_title(f"requests per {unit}")
        for axis, key, target in ((ttft, "ttft", slo.ttft), (tpot, "tpot", slo.tpot)):
            _latency(axis, times, [getattr(w, f"{key}_p90") for w in outcome.windows], target)
            axis.set_title(f"{key.upper()}, P90, {unit}")
        _workers(workers, outcome.staff, scale, outcome.horizon)
        workers.set_title("workers")
        _reasons(why, outcome.decisions, scale)
        why.set_title("changes and their reasons")
        why.set_xlim(0, outcome.horizon / scale)
        why.set_xlabel(f"time, {name}")


def draw_front(path: Path, title: str, trials: Sequence[Trial], chosen: Trial) -> None:
    """Attainment against actor-seconds; the front as a line, the first trial and the chosen one
    marked.

    Raises:
        PlannerError: the file cannot be written.
    """
    from autoscaler.tune import front

    best = front(trials)
    with picture(path, title, 4.6) as figure:
        axis = figure.subplots()
        _dots(axis, trials, color="#b9c3cf", s=22, label="tried")
        line = [trial.actor_seconds for trial in best], [trial.attainment for trial in best]
        axis.plot(*line, "-o", color=ATTENTION, ms=5, lw=1.2, label="Pareto front")
        _dots(axis, trials[:1], color=SIMULATION, marker="s", s=44, label="as given", zorder=4)
        _dots(axis, [chosen], color=CHOSEN, marker="*", s=150, label="chosen", zorder=5)
        axis.set_xlabel("actor-seconds")
        axis.set_ylabel("attainment")
        axis.legend(loc="lower right")


def draw_days(
    path: Path, title: str, days: Mapping[str, tuple[Outcome, Mapping[str, Outcome]]]
) -> None:
    """One column per trace: rate, attainment, and workers of both roles against the best static.

    Args:
        days: name -> (best static, policy name -> outcome).

    Raises:
        PlannerError: the file cannot be written.
    """
    with picture(path, title, 6.6) as figure:
        axes = figure.subplots(3, len(days), sharex=True, squeeze=False)
        for column, (name, (static, policies)) in enumerate(days.items()):
            rate, attained, workers = axes[:, column]
            times = [window.at / _HOUR for window in static.windows]
            rates = [window.rate for window in static.windows]
            rate.step(times, rates, where="post", color=TRANSFER, lw=1)
            rate.set_title(f"{name}: requests per second")
            outcomes = {"best static in hindsight": static, **policies}
            for index, (policy, outcome) in enumerate(outcomes.items()):
                colour = SIMULATION if index == 0 else _REASONS[(index - 1) % len(_REASONS)]
                style: dict[str, Any] = {"color": colour, "lw": 1.1, "label": policy}
                style["ls"] = "--" if index == 0 else "-"
                attained.plot(times, [w.attainment for w in outcome.windows], **style)
                edges, total = _steps(outcome.staff, _HOUR, outcome.horizon, "both")
                workers.step(edges, total, where="post", **style)
            attained.set_title("share of requests within both targets")
            workers.set_title("attention and FFN workers, starting and draining ones included")
            workers.set_xlim(0, static.horizon / _HOUR)
            workers.set_ylim(bottom=0)
            workers.set_xlabel("hour of the day")
            workers.legend(loc="upper left", fontsize=7.5)


def _latency(axis: Any, times: Sequence[float], values: Sequence[float], target: float) -> None:
    axis.plot(times, values, color=SIMULATION, lw=1)
    axis.axhline(target, color=CHOSEN, lw=1, ls="--", label=f"target {target:g}")
    known = [value for value in values if value == value]
    top = max([*known, target])
    # One collapse must not flatten all the rest.
    axis.set_ylim(0, min(1.1 * top, 4 * target))
    axis.legend(loc="upper right")


def _workers(axis: Any, staff: Sequence[Staff], scale: float, horizon: float) -> None:
    for role, colour in (("attention", ATTENTION), ("ffn", FFN)):
        edges, serving = _steps(staff, scale, horizon, role)
        _, paid = _steps(staff, scale, horizon, f"{role}_paid")
        label = "FFN" if role == "ffn" else role
        axis.step(edges, serving, where="post", color=colour, lw=1.3, label=label)
        axis.fill_between(edges, serving, paid, step="post", color=colour, alpha=0.3, lw=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right", title="shaded: starting, draining", title_fontsize=8)


def _steps(
    staff: Sequence[Staff], scale: float, horizon: float, what: str
) -> tuple[list[float], list[int]]:
    """Edges of a step line and its values, up to the horizon."""
    kept = [entry for entry in staff if entry.at <= horizon]

    def value(entry: Staff) -> int:
        if what == "both":
            return entry.attention_paid + entry.ffn_paid
        return int(getattr(entry, what))

    edges = [entry.at / scale for entry in kept]
    values = [value(entry) for entry in kept]
    return [*edges, horizon / scale], [*values, *values[-1:]]


def _reasons(axis: Any, decisions: Sequence[Decision], scale: float) -> None:
    made = [decision for decision in decisions if decision.target is not None]
    if not made:
        axis.text(0.01, 0.4, "no change", transform=axis.transAxes, color=EVENT)
        axis.set_yticks([])
        return
    names = list(dict.fromkeys(str(decision.reasons[0]) for decision in made))
    for index, name in enumerate(names):
        at = [d.at / scale for d in made if d.reasons[0] == name]
        colour = _REASONS[index % len(_REASONS)]
        axis.scatter(at, [index] * len(at), marker="|", s=70, color=colour, lw=1.2)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(-0.6, len(names) - 0.4)


def _dots(axis: Any, trials: Sequence[Trial], **style: Any) -> None:
    axis.scatter([t.actor_seconds for t in trials], [t.attainment for t in trials], **style)
