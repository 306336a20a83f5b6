"""Tables, JSON and the picture of ``bench slo``. Judges nothing: see ``attainment``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import attainment as judging
from benchmarks.attainment import Targets
from benchmarks.report import print_summary, print_table
from benchmarks.scenarios import Scenario
from benchmarks.slo_runs import Run, by_phase, reversals
from benchmarks.timeline import ATTENTION, FFN, TOKENS
from cluster.spec import ClusterSpec

POLICY, STATIC, TARGET, SHADE = "#2a8c7c", "#9aa5b1", "#b3202c", "#f3f3f3"
NOTE = "emulated devices: stage times are modelled; requests, tokens and changes are real"


def line(one: Run) -> str:
    """A run in one line."""
    found = judging.figures(one.outcomes)
    text = (
        f"{one.name:<14} attainment {one.attainment:.3f}  TPOT p90 {_ms(found['tpot_p90_s'])}  "
        f"TTFT p90 {_ms(found['ttft_p90_s'])}  unfinished {found['unfinished']}  "
        f"lost {found['lost']}"
    )
    if one.changes:
        text += "  " + " -> ".join(f"{change} at {change.at:.0f} s" for change in one.changes)
    return text


def details(scenario: Scenario, runs: Sequence[Run], spec: ClusterSpec) -> dict[str, Any]:
    """Everything that a reader of the JSON may want."""
    return {
        "note": NOTE,
        "scenario": {
            "name": scenario.name,
            "phases": [
                {"name": name, "begins_s": begin, "requests": count}
                for (begin, name), count in zip(
                    scenario.phases, _requests_by_phase(scenario), strict=True
                )
            ],
            "notes": list(scenario.notes),
        },
        "emulate": spec.emulate.model_dump(mode="json") if spec.emulate else None,
        "autoscaler": spec.autoscaler.model_dump(mode="json"),
        "runs": [_run(scenario, one) for one in runs],
    }


def print_runs(report: dict[str, Any], scenario: Scenario, runs: Sequence[Run]) -> None:
    """The runs by attainment, and the summary."""
    names = [name for _, name in scenario.phases]
    rows = []
    for one in sorted(runs, key=lambda one: (not one.policy, -one.attainment)):
        whole = judging.figures(one.outcomes)
        rows.append(
            (
                one.name,
                one.attainment,
                *(judging.attainment(part) for part in _parts(scenario, one)),
                judging.attainment(one.simulated),
                f"{_ms(whole['tpot_p50_s'])} / {_ms(whole['tpot_p90_s'])}",
                _ms(whole["ttft_p90_s"]),
                " ".join(map(str, by_phase(scenario, one))) if one.policy else None,
                whole["unfinished"],
                whole["lost"],
            )
        )
    columns = ("run", "attainment", *names, "simulated", "TPOT p50 / p90", "TTFT p90")
    columns += ("changes by phase", "unfinished", "lost")
    print_table(f"slo: {scenario.name} ({NOTE})", columns, rows)
    replayed = [one for one in runs if one.simulated]
    if replayed:
        print_table(
            "measured → simulated, with the latencies that the controller had fitted",
            ("run", "tokens/s", "TPOT p50 ms", "TPOT p90 ms"),
            [(one.name, *_beside(scenario, one)) for one in replayed],
        )
    print_summary(report)


def draw(path: Path, scenario: Scenario, runs: Sequence[Run], targets: Targets) -> None:
    """A column of timelines for each policy and the best static split, and bars of attainments."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = _shown(runs)
    if not shown:
        return
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
    }
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(4.6 * max(2, len(shown)), 9.4), layout="constrained")
        grid = figure.add_gridspec(4, len(shown), height_ratios=(2, 2, 1.7, 2))
        first: dict[int, Any] = {}
        for column, one in enumerate(shown):
            for row, panel in enumerate((_rates, _tpot, _actors)):
                axis = figure.add_subplot(grid[row, column], sharey=first.get(row))
                first.setdefault(row, axis)
                _phases(axis, scenario, named=row == 0)
                panel(axis, scenario, one, runs, targets)
                for change in one.changes:
                    axis.axvline(change.at, color="#7a4fa3", linewidth=1.0)
                axis.set_xlim(0, scenario.seconds)
                axis.label_outer()
                if row == 0:
                    axis.set_title(f"{one.name}: {one.attainment:.1%}", weight="bold", pad=16)
                if row == 2:  # the bars below have an axis of their own
                    axis.tick_params(labelbottom=True)
                    axis.set_xlabel("seconds")
        _bars(figure.add_subplot(grid[3, :]), runs)
        figure.suptitle(
            f"afflux bench slo --scenario {scenario.name}   ·   {NOTE}",
            x=0.01,
            ha="left",
            weight="bold",
            fontsize=10,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white")
        pyplot.close(figure)


# -- panels --------------------------------------------------------------------------------------


def _rates(axis: Any, scenario: Scenario, one: Run, runs: Sequence[Run], targets: Targets) -> None:
    tokens = _smooth(np.array(one.rate, dtype=float))
    axis.plot(np.arange(len(tokens)) + 0.5, tokens, color=TOKENS, linewidth=1.4, label="tokens/s")
    wanted = np.zeros(len(tokens))
    for asked in scenario.asked:
        wanted[min(int(asked.at), len(wanted) - 1)] += asked.output
    axis.plot(
        np.arange(len(tokens)) + 0.5,
        _smooth(wanted),
        color="#6b6b6b",
        linewidth=1.0,
        ls=":",
        label="asked for, tokens/s",
    )
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s")
    axis.legend(loc="lower right", frameon=False, fontsize=7.5)


def _tpot(axis: Any, scenario: Scenario, one: Run, runs: Sequence[Run], targets: Targets) -> None:
    top = 3 * targets.tpot_s * 1e3
    for other in runs:
        if not other.policy and other is not one:
            seconds, values = judging.tpot_over_time(other.outcomes, scenario.seconds)
            axis.plot(seconds, np.minimum(values * 1e3, top), color=STATIC, lw=0.7, alpha=0.6)
    seconds, values = judging.tpot_over_time(one.outcomes, scenario.seconds)
    colour = POLICY if one.policy else "#4c5866"
    axis.plot(seconds, np.minimum(values * 1e3, top), color=colour, linewidth=1.8)
    axis.axhline(targets.tpot_s * 1e3, color=TARGET, linewidth=1.0, ls="--")
    axis.set_ylim(0, top)
    axis.set_ylabel("TPOT p90 by arrival, ms\n(grey: static splits)")


def _actors(axis: Any, scenario: Scenario, one: Run, runs: Sequence[Run], targets: Targets) -> None:
    times = [0.0, *(change.at for change in one.changes), scenario.seconds]
    for index, (name, colour) in enumerate((("attention", ATTENTION), ("FFN", FFN))):
        counts = [
            one.begin[index],
            *((change.attention, change.ffn)[index] for change in one.changes),
        ]
        shift = 0.04 if index else -0.04  # so that equal counts do not hide one of the lines
        steps = np.array([*counts, counts[-1]]) + shift
        axis.step(times, steps, where="post", color=colour, linewidth=2.0, label=name)
    axis.set_ylim(0, sum(one.begin))
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("actors")
    axis.legend(loc="upper right", ncols=2, frameon=False, fontsize=7.5)


def _phases(axis: Any, scenario: Scenario, *, named: bool) -> None:
    ends = [begin for begin, _ in scenario.phases[1:]] + [scenario.seconds]
    for index, ((begin, name), end) in enumerate(zip(scenario.phases, ends, strict=True)):
        if index % 2:
            axis.axvspan(begin, end, color=SHADE, zorder=0)
        if named:
            axis.annotate(
                name,
                xy=((begin + end) / 2, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color="#555555",
            )


def _bars(axis: Any, runs: Sequence[Run]) -> None:
    order = sorted(runs, key=lambda one: (not one.policy, one.name))
    values = [one.attainment for one in order]
    bars = axis.bar(
        [one.name for one in order],
        values,
        width=0.6,
        color=[POLICY if one.policy else STATIC for one in order],
    )
    axis.bar_label(bars, [f"{value:.0%}" for value in values], fontsize=8, padding=2)
    for index, one in enumerate(order):
        if one.simulated:
            label = "in the simulator" if not index else None
            share = judging.attainment(one.simulated)
            axis.plot([index], [share], "_", color="black", ms=22, label=label)
    axis.set_ylim(0, 1.08)
    axis.set_ylabel("requests within\nboth targets")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper right", frameon=False, fontsize=7.5)


# -- small things --------------------------------------------------------------------------------


def _shown(runs: Sequence[Run]) -> list[Run]:
    statics = sorted((one for one in runs if not one.policy), key=lambda one: -one.attainment)
    return [*(one for one in runs if one.policy), *statics[:1]]


def _run(scenario: Scenario, one: Run) -> dict[str, Any]:
    return {
        "name": one.name,
        "policy": one.policy,
        "begins_at": f"{one.begin[0]}A{one.begin[1]}F",
        **judging.figures(one.outcomes),
        "errors": dict(Counter(outcome.error for outcome in one.outcomes if outcome.lost)),
        "tokens_per_second": judging.throughput(scenario, one.outcomes),
        "simulated": judging.figures(one.simulated)
        | {"tokens_per_second": judging.throughput(scenario, one.simulated)}
        if one.simulated
        else None,
        "model": one.model,
        "phases": [
            {"name": name, **judging.figures(part)}
            for (_, name), part in zip(scenario.phases, _parts(scenario, one), strict=True)
        ],
        "changes": [asdict(change) | {"to": str(change)} for change in one.changes],
        "changes_by_phase": by_phase(scenario, one),
        "reversals": reversals(scenario, one),
        "refused": one.refused,
        "decisions": one.decisions,
        "began": one.began,
    }


def _parts(scenario: Scenario, one: Run) -> list[list[judging.Outcome]]:
    parts: list[list[judging.Outcome]] = [[] for _ in scenario.phases]
    for outcome in one.outcomes:
        parts[outcome.phase].append(outcome)
    return parts


def _requests_by_phase(scenario: Scenario) -> list[int]:
    ends = [begin for begin, _ in scenario.phases[1:]] + [math.inf]
    return [
        sum(begin <= asked.at < end for asked in scenario.asked)
        for (begin, _), end in zip(scenario.phases, ends, strict=True)
    ]


def _beside(scenario: Scenario, one: Run) -> list[str]:
    """Throughput and TPOT percentiles, measured and simulated."""
    pairs = [
        (judging.throughput(scenario, one.outcomes), judging.throughput(scenario, one.simulated))
    ]
    measured, simulated = judging.figures(one.outcomes), judging.figures(one.simulated)
    pairs += [(measured[key] * 1e3, simulated[key] * 1e3) for key in ("tpot_p50_s", "tpot_p90_s")]
    return [f"{seen:.0f} → {said:.0f} {said / seen - 1:+.0%}" for seen, said in pairs]


def _smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    if len(values) < width:
        return values
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, "valid")


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:.0f} ms"
