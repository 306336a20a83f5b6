"""What ``afflux policy replay`` and ``tune`` show: tables, and the same as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from afflux.planning import number, percent, print_rows, say

if TYPE_CHECKING:
    from rich.console import Console

    from autoscaler.hindsight import Hindsight
    from autoscaler.replay import Outcome, Scenario
    from autoscaler.tune import Trial, Tuning


def print_scenario(console: Console, scenario: Scenario, notes: Sequence[str]) -> None:
    """What is replayed, for which targets, on which actors."""
    trace, slo, limits, cluster = scenario.trace, scenario.slo, scenario.limits, scenario.cluster
    low, high = limits.total
    total = f"{low} together" if low == high else f"{low}..{high} together"
    lines = [
        f"requests  {trace.source}: {len(trace):,} in {number(float(trace.arrival[-1]))} s",
        f"targets   {slo.percentile:.0%} within TTFT {slo.ttft:g} s and TPOT {slo.tpot:g} s",
        f"actors    attention {limits.attention[0]}..{limits.attention[1]}, "
        f"FFN {limits.ffn[0]}..{limits.ffn[1]}, {total}; "
        f"{cluster.attention}A{cluster.ffn}F at the start, "
        f"{cluster.changes.prepare_attention:.3g} s to start one",
        *notes,
    ]
    for line in lines:
        say(console, line)


def print_outcomes(console: Console, outcomes: dict[str, Outcome], best: Hindsight | None) -> None:
    columns = ("policy", "both", "TTFT", "TPOT", "actor-s", "A", "F", "changes", "back")
    shown = dict(outcomes)
    if best is not None:
        shown[f"static {best.counts}"] = best.outcome
    rows = []
    for name, outcome in shown.items():
        span = outcome.horizon or 1.0
        rows.append(
            (
                name,
                percent(outcome.attainment),
                percent(outcome.ttft_met),
                percent(outcome.tpot_met),
                number(outcome.actor_seconds),
                number(outcome.attention_seconds / span),
                number(outcome.ffn_seconds / span),
                str(outcome.changes),
                str(outcome.reversals),
            )
        )
    print_rows(
        console,
        "Simulated: requests within the targets, mean actors, changes of which taken back",
        columns,
        rows,
    )
    for name, outcome in outcomes.items():
        words = ", ".join(f"{reason} {count}" for reason, count in outcome.reasons.items())
        say(console, f"{name} decided by: {words}")
        if outcome.rejected or outcome.unfinished:
            say(
                console,
                f"{name}: {outcome.rejected:,} requests refused, {outcome.unfinished:,} unfinished",
            )


def print_worst(console: Console, name: str, outcome: Outcome) -> None:
    """Where most was missed; nothing where nothing was."""
    if not outcome.worst:
        return
    rows = [
        (
            number(window.at),
            str(window.requests),
            percent(window.attainment),
            number(window.ttft_p90),
            number(window.tpot_p90),
        )
        for window in outcome.worst
    ]
    columns = ("from, s", "requests", "attained", "TTFT P90", "TPOT P90")
    print_rows(console, f"{name}: its worst windows", columns, rows)


def print_tuning(console: Console, found: Tuning, chosen: Trial, goal: float) -> None:
    """The Pareto front, and the chosen point as YAML."""
    import yaml

    shown = [found.trials[0], *(t for t in found.front if t is not found.trials[0])]
    columns = ("", "attained", "actor-s", "TTFT P90", "TPOT P90", "changes", "back")
    rows = []
    for trial in shown:
        mark = "as given" if trial is found.trials[0] else ""
        times = (number(trial.ttft_p90), number(trial.tpot_p90))
        counts = (str(trial.changes), str(trial.reversals))
        cells = (percent(trial.attainment), number(trial.actor_seconds), *times, *counts)
        rows.append(("chosen" if trial is chosen else mark, *cells))
    tried = f"{len(found.trials)} tried, {found.refused} refused by the policy"
    print_rows(console, f"Pareto front, {tried}", columns, rows, bold=shown.index(chosen))
    if chosen.attainment < goal:
        say(console, f"note: nothing reached {goal:.1%}; chosen is what came nearest")
    say(console, "")
    text = yaml.safe_dump({"autoscaler": found.section(chosen)}, sort_keys=False)
    say(console, text.rstrip())


def replay_json(
    scenario: Scenario, outcomes: dict[str, Outcome], best: Hindsight | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    from autoscaler.replay import figures, series

    slo = scenario.slo
    summary: dict[str, Any] = {
        "requests": len(scenario.trace),
        "source": scenario.trace.source,
        "ttft_target": slo.ttft,
        "tpot_target": slo.tpot,
    }
    for name, outcome in outcomes.items():
        summary |= {f"{name}_{key}": value for key, value in figures(outcome).items()}
    if best is not None:
        summary["best_static"] = str(best.counts)
        summary["attainment_best_static"] = best.outcome.attainment
        summary["actor_seconds_best_static"] = best.outcome.actor_seconds
    return summary, {name: series(outcome) for name, outcome in outcomes.items()}


def tuning_json(found: Tuning, chosen: Trial, goal: float) -> tuple[dict[str, Any], dict[str, Any]]:
    def as_data(trial: Trial) -> dict[str, Any]:
        return {**vars(trial), "values": dict(trial.values)}

    summary = {
        "policy": found.policy,
        "trials": len(found.trials),
        "refused": found.refused,
        "goal": goal,
        "attainment": chosen.attainment,
        "actor_seconds": chosen.actor_seconds,
        "attainment_as_given": found.trials[0].attainment,
        "actor_seconds_as_given": found.trials[0].actor_seconds,
    }
    details = {
        "chosen": found.section(chosen),
        "front": [as_data(trial) for trial in found.front],
        "trials": [as_data(trial) for trial in found.trials],
    }
    return summary, details
