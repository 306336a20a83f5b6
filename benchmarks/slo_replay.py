"""A recorded `bench slo`, again in the simulator: same requests, changes and fitted stage times.

And once more with all stage times a few percent shorter and longer, because at the edge of
saturation these decide whether a backlog grows; a figure is *explained* where what was measured
lies between the two, or within ``WITHIN`` of the middle one. Serves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import attainment as judging
from benchmarks import scenarios, slo_model
from benchmarks.attainment import Change, Targets
from benchmarks.report import make_report, print_summary, print_table, write_report
from benchmarks.scenarios import Scenario
from benchmarks.slo import ROOM, slo_spec
from benchmarks.slo_runs import Run
from cluster.preflight import check_model
from planner.curves import read_curve

FIGURES = ("tokens_per_second", "tpot_p50_s", "tpot_p90_s")
WITHIN = {"tokens_per_second": 0.10, "tpot_p50_s": 0.15, "tpot_p90_s": 0.15}
"""How far the simulator may be off, as a share of what was measured."""


def run(
    recorded: Path,
    json_path: Path | None = None,
    *,
    percent: float = 5.0,
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Replay every run of the file that has a fitted model; prints a table, writes JSON.

    Args:
        recorded: what ``bench slo --json`` wrote.
        percent: of all stage times, less and more.
        seed: the recorded run's.

    Raises:
        ValueError: the file is no such report, or other requests were sent.
    """
    report = json.loads(recorded.read_text())
    try:
        facts, entries = report["summary"], report["details"]["runs"]
        scenario = _scenario(facts, report["details"]["scenario"]["phases"], seed)
        targets = Targets(ttft_s=facts["ttft_target_s"], tpot_s=facts["tpot_target_s"])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{recorded} lacks {error}; expected what `afflux bench slo --json` writes"
        ) from None
    spec = slo_spec(targets, 0, ())
    checkpoint = check_model(spec)
    rows = []
    # where nothing was answered, nothing was fitted
    entries = [one for one in entries if one["model"] and one["tokens_per_second"]]
    for number, entry in enumerate(entries):
        if progress is not None:
            progress(entry["name"], number / len(entries))
        one = run_of(entry)
        level = level_of(entry["model"], report["details"]["emulate"], len(checkpoint.moe_layers))
        found = {}
        for factor in (1 - percent / 100, 1.0, 1 + percent / 100):
            one.model = entry["model"] | {"level": level / factor}
            outcomes = slo_model.repeat(scenario, spec, targets, one, checkpoint)
            rate = judging.throughput(scenario, outcomes)
            found[factor] = judging.figures(outcomes) | {"tokens_per_second": rate}
        rows.append(compared(entry, *found.values()))
    result = make_report("slo-replay", _summary(rows, percent, recorded.name), {"runs": rows})
    _print(result, rows, percent)
    write_report(result, json_path)
    return result


def run_of(entry: Mapping[str, Any]) -> Run:
    """A run as far as the simulator needs it, of the report's entry."""
    attention, ffn = map(int, entry["begins_at"].removesuffix("F").split("A"))
    changes = [
        Change(change["at"], change["attention"], change["ffn"]) for change in entry["changes"]
    ]
    return Run(entry["name"], entry["policy"], (attention, ffn), changes=changes)


def compared(
    measured: Mapping[str, Any],
    faster: Mapping[str, Any],
    same: Mapping[str, Any],
    slower: Mapping[str, Any],
) -> dict[str, Any]:
    """One run: each figure measured, simulated, and over the range; whether it is explained."""
    row: dict[str, Any] = {"run": measured["name"]}
    for key in FIGURES:
        seen, said = measured[key], same[key]
        low, high = sorted((faster[key], slower[key]))
        near = abs(said / seen - 1) <= WITHIN[key]
        row[key] = {
            "measured": seen,
            "simulated": said,
            "low": low,
            "high": high,
            "within": near,
            "explained": near or low <= seen <= high,
        }
    return row


def _scenario(facts: Mapping[str, Any], phases: list[Mapping[str, Any]], seed: int) -> Scenario:
    name = facts["scenario"]
    drawn = scenarios.draw(
        name, scenarios.phases_of(name, duration=facts["seconds"]), seed=seed, room=ROOM
    )
    sent = sum(phase["requests"] for phase in phases)
    if len(drawn.asked) != sent or drawn.seconds != facts["seconds"]:
        raise ValueError(
            f"{name} with seed {seed} has {len(drawn.asked)} requests in {drawn.seconds:g} s, the "
            f"recorded run {sent} in {facts['seconds']:g} s; give its --seed (--quick can't be "
            "replayed)"
        )
    return drawn


def level_of(model: Mapping[str, Any], emulated: Mapping[str, Any], layers: int) -> float:
    """The model's level (``autoscaler.model``); where a report is too old to say it, the fitted
    slope of attention over that of the emulated device, which measuring can't get wrong."""
    if "level" in model:
        return float(model["level"])
    fitted = read_curve("attention", model["latencies"]["attention"])
    return float(
        (fitted(2000.0) - fitted(1000.0)) / (1000.0 * layers * emulated["attention"]["a_s"])
    )


def _summary(rows: list[dict[str, Any]], percent: float, name: str) -> dict[str, Any]:
    facts: dict[str, Any] = {"recorded": name, "runs": len(rows), "percent": percent}
    for key in FIGURES:
        facts[f"{key}_within"] = sum(row[key]["within"] for row in rows)
        facts[f"{key}_explained"] = sum(row[key]["explained"] for row in rows)
    return facts


def _print(report: Mapping[str, Any], rows: list[dict[str, Any]], percent: float) -> None:
    table = []
    for row in rows:
        cells = [row["run"]]
        for key in FIGURES:
            one, unit = row[key], 1 if key == "tokens_per_second" else 1e3
            mark = "" if one["within"] else (" ~" if one["explained"] else " !")
            cells.append(
                f"{one['measured'] * unit:.0f} → {one['simulated'] * unit:.0f} "
                f"({one['low'] * unit:.0f}..{one['high'] * unit:.0f}){mark}"
            )
        table.append(cells)
    print_table(
        f"measured → simulated (with stage times {percent:g} % shorter..longer; "
        "~ only that range covers it, ! not even that)",
        ("run", "tokens/s", "TPOT p50 ms", "TPOT p90 ms"),
        table,
    )
    print_summary(report)
