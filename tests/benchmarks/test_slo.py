"""bench slo without a deployment: how requests are judged, which figures follow, the picture."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afflux.main import app
from benchmarks import slo_model, slo_report
from benchmarks.attainment import (
    Change,
    Outcome,
    Targets,
    attainment,
    changes_by_phase,
    figures,
    judge,
    reversals,
    throughput,
    tpot_over_time,
)
from benchmarks.load import Stream
from benchmarks.open_load import ENDED
from benchmarks.report import make_report
from benchmarks.scenarios import Asked, Phase, Piece, Scenario, draw
from benchmarks.slo import slo_spec
from benchmarks.slo_runs import BUDGET, MIDDLE, POLICIES, SPLITS, Run, plan, split_name, summary
from cluster.preflight import check_model

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)
BEGAN = 1000.0
SHIFT = Scenario("shift", (), ((0.0, "chat"), (10.0, "long"), (20.0, "chat")), 30.0)


def asked(at: float, output: int = 3) -> Asked:
    return Asked(at, "chat", (Piece("own", 8),), output)


def scenario(*requests: Asked) -> Scenario:
    return Scenario("shift", requests, SHIFT.phases, SHIFT.seconds)


def stream(place: int, at: float, gaps: tuple[float, ...], error: str = "") -> Stream:
    """Sent at ``at``; each token comes a gap after the one before."""
    times, now = [], BEGAN + at
    for gap in gaps:
        now += gap
        times.append(now)
    return Stream(place, BEGAN + at, times, [1] * len(times), now, error)


def outcome(at: float = 0.0, *, met: bool = True, phase: int = 0, lost: bool = False) -> Outcome:
    tpot = 0.05 if met else 0.5
    return Outcome(at, phase, 0.2, tpot, at + 1, not lost, lost, met and not lost)


# -- judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gaps", "met"),
    [
        ((0.9, 0.05, 0.05), True),
        ((1.1, 0.05, 0.05), False),
        ((0.2, 0.01, 0.15), True),  # TPOT is a mean
        ((0.2, 0.15, 0.15), False),
    ],
)
def test_a_request_is_within_both_targets_or_not(gaps: tuple[float, ...], met: bool):
    (found,) = judge(scenario(asked(5.0)), [stream(0, 5.0, gaps)], TARGETS, BEGAN)
    assert found.met is met and found.complete
    assert found.ttft == pytest.approx(gaps[0])
    assert found.tpot == pytest.approx(sum(gaps[1:]) / 2)


def test_an_answer_of_one_token_has_no_tpot():
    (found,) = judge(scenario(asked(0.0, output=1)), [stream(0, 0.0, (0.5,))], TARGETS, BEGAN)
    assert found.met and math.isnan(found.tpot)


def test_a_late_load_generator_makes_nobody_quick():
    (found,) = judge(scenario(asked(5.0)), [stream(0, 7.0, (0.1, 0.01, 0.01))], TARGETS, BEGAN)
    assert found.ttft == pytest.approx(2.1) and not found.met


def test_whoever_got_no_whole_answer_has_missed():
    streams = [
        stream(0, 0.0, (0.1, 0.01), error="HTTP 500: no"),
        stream(1, 1.0, (0.1, 0.01), error=ENDED),
    ]
    requests = scenario(asked(0.0), asked(1.0), asked(25.0))
    lost, late, never = judge(requests, streams, TARGETS, BEGAN)
    assert lost.lost and not lost.met and lost.error == "HTTP 500: no"
    assert not late.lost and not late.complete and not late.met
    assert not never.lost and not never.met and never.phase == 2
    found = figures([lost, late, never])
    assert (found["lost"], found["unfinished"], found["completed"]) == (1, 2, 0)
    assert found["attainment"] == 0.0 and math.isnan(found["tpot_p90_s"])


def test_attainment_counts_every_request():
    assert attainment([outcome(), outcome(), outcome(met=False), outcome(lost=True)]) == 0.5
    assert math.isnan(attainment([]))


def test_throughput_counts_complete_answers_until_the_last():
    three = scenario(asked(0.0, 10), asked(1.0, 10), asked(2.0, 10))
    rows = [outcome(0.0), outcome(1.0), outcome(2.0, lost=True)]
    assert throughput(three, rows) == 10.0  # two answers, the last ended after 2 s
    assert math.isnan(throughput(three, [outcome(lost=True)] * 3))


def test_tpot_over_time_shows_what_never_ended():
    rows = [outcome(1.0), outcome(3.0, met=False), outcome(5.0, lost=True)]
    middles, values = tpot_over_time(rows, 8.0, step_s=2.0)
    assert middles.tolist() == [1.0, 3.0, 5.0, 7.0]
    assert values[:2].tolist() == [0.05, 0.5]
    assert math.isinf(values[2]) and math.isnan(values[3])


def test_changes_are_counted_by_phase():
    changes = [Change(at, 4, 4) for at in (-0.1, 3.0, 12.0, 20.0, 29.0, 40.0)]
    assert changes_by_phase(SHIFT, changes) == [2, 1, 3]


@pytest.mark.parametrize(
    ("moves", "count"),
    [
        ([(1.0, 3), (12.0, 5), (22.0, 3)], 0),  # there and back, once per shift
        ([(1.0, 3), (3.0, 2), (12.0, 4), (14.0, 6)], 0),
        ([(1.0, 3), (3.0, 4)], 1),
        ([(1.0, 5), (3.0, 4), (5.0, 5), (7.0, 5)], 2),
    ],
)
def test_going_back_within_a_phase_is_oscillation(moves: list[tuple[float, int]], count: int):
    changes = [Change(at, attention, 8 - attention) for at, attention in moves]
    assert reversals(SHIFT, 4, changes) == count


# -- runs and figures ----------------------------------------------------------------------------


def test_policies_come_first_then_every_split():
    runs = plan()
    assert [run.name for run in runs[: len(POLICIES)]] == list(POLICIES)
    assert all(run.begin == MIDDLE for run in runs if run.policy)
    assert [run.begin for run in runs if not run.policy] == list(SPLITS)
    assert all(sum(run.begin) == BUDGET for run in runs) and len(SPLITS) == 7
    assert [run.name for run in plan(["static"])] == [split_name(split) for split in SPLITS]
    assert [run.name for run in plan(["3A5F", "slo_feedback"])] == ["slo_feedback", "3A5F"]
    with pytest.raises(ValueError, match=r"9A1F.*3A5F"):
        plan(["9A1F"])


def finished(policy: float = 0.9, best: float = 0.7) -> list[Run]:
    runs = plan()
    for number, run in enumerate(runs):
        share = policy if run.policy else best - 0.1 * number
        good = round(20 * max(0.0, share))
        rows = [outcome(1.5 * i, met=i < good, phase=min(2, i // 7)) for i in range(20)]
        run.outcomes, run.simulated, run.rate = rows, rows, [5] * 31
        if run.policy:
            run.changes = [Change(3.0, 3, 5, 2.0), Change(13.0, 5, 3, 2.0), Change(23.0, 3, 5)]
    return runs


def test_summary_of_a_whole_comparison():
    found = summary(SHIFT, finished(), TARGETS)
    assert found["attainment"] == 0.9
    assert found["attainment_best_static"] == 0.5
    assert found["attainment_median_static"] == 0.2
    assert found["changes"] == 1 and found["lost"] == 0 and found["oscillations"] == 0
    assert found["attainment_optimal_ratio"] == 0.9 and found["attainment_7A1F"] == 0.0
    assert found["emulation"] is True and found["holds"] is True


@pytest.mark.parametrize("fault", ["worse", "lost", "often", "back"])
def test_summary_says_when_it_does_not_hold(fault: str):
    runs = finished(policy=0.4) if fault == "worse" else finished()
    first = runs[0]
    if fault == "lost":
        first.outcomes[0] = outcome(lost=True)
    elif fault == "often":
        first.changes = [Change(at, 5 + n, 3 - n) for n, at in enumerate((11.0, 13.0, 15.0))]
    elif fault == "back":
        first.changes = [Change(11.0, 5, 3), Change(15.0, 4, 4)]
    assert summary(SHIFT, runs, TARGETS)["holds"] is False


def test_summary_of_a_part_compares_with_nothing():
    found = summary(SHIFT, finished()[:1], TARGETS)
    assert found["attainment"] == 0.9 and found["attainment_best_static"] is None
    statics = summary(SHIFT, finished()[2:], TARGETS)
    assert statics["attainment"] is None and "holds" not in statics


def test_report_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    runs = finished()
    runs[-1].outcomes[0] = replace(outcome(lost=True), error="HTTP 500: no")
    requests = scenario(*(asked(1.5 * i) for i in range(20)))
    spec = slo_spec(TARGETS, 1, [])
    report = make_report(
        "slo", summary(requests, runs, TARGETS), slo_report.details(requests, runs, spec)
    )
    text = json.dumps(report)
    assert "emulated" in text and '"to": "3A5F"' in text and '{"HTTP 500: no": 1}' in text
    slo_report.print_runs(report, requests, runs)
    slo_report.draw(tmp_path / "deep" / "slo.png", requests, runs, TARGETS)
    assert (tmp_path / "deep" / "slo.png").stat().st_size > 10_000
    assert "optimal_ratio" in capsys.readouterr().out
    assert "3A5F at 3 s" in slo_report.line(runs[0])


def test_the_spec_fixes_the_budget():
    spec = slo_spec(TARGETS, 2, ["autoscaler.window_s=9"])
    scaler = spec.autoscaler
    assert scaler.mode == "on" and scaler.window_s == 9
    assert scaler.min_total == scaler.max_total == BUDGET == spec.attention.count + spec.ffn.count
    assert spec.slo.tpot_s == TARGETS.tpot_s and spec.emulate is not None
    assert spec.attention.max >= SPLITS[-1][0] and spec.ffn.max >= SPLITS[0][1]


# -- beside the simulator ------------------------------------------------------------------------


def test_the_simulator_runs_splits_and_policies():
    phases = [
        Phase("chat", 12.0, 8.0, prompt=(32, 64), output=(16, 32)),
        Phase("long", 12.0, 8.0, prompt=(8, 24), output=(16, 32), shared=512, groups=2),
    ]
    small = draw("shift", phases, seed=0, room=1024)
    targets = Targets(4.0, 0.8)
    spec = slo_spec(targets, 1, [])
    checkpoint = check_model(spec)
    found = {
        run.name: slo_model.rehearse(small, spec, targets, run, checkpoint)
        for run in plan(["3A5F", "7A1F", "slo_feedback"])
    }
    assert all(len(run.outcomes) == len(small.asked) for run in found.values())
    assert found["3A5F"].attainment > found["7A1F"].attainment
    assert not found["3A5F"].changes
    for change in found["slo_feedback"].changes:
        assert change.attention + change.ffn == BUDGET
    run = found["3A5F"]
    assert slo_model.repeat(small, spec, targets, run, checkpoint) == run.outcomes
    assert slo_model.uneven(spec, checkpoint, 4) == pytest.approx(1.0)


# -- the command ---------------------------------------------------------------------------------


def test_help():
    result = CliRunner().invoke(app, ["bench", "slo", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in ("--scenario", "--only", "--quick", "steady", "emulated"):
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scenario", "chaos"], "there is no scenario"),
        (["--only", "9A9F"], "9A9F"),
        (["--scenario", "trace"], "--trace"),
        (["--scenario", "trace", "--trace", "no.csv"], "no.csv"),
    ],
)
def test_refusals(arguments: list[str], words: str):
    result = CliRunner().invoke(app, ["bench", "slo", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert words in result.output
