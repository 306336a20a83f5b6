"""What the controller did can be read back, as reports and as metrics."""

from __future__ import annotations

import json
import logging

import pytest
from prometheus_client import generate_latest

from autoscaler.journal import KEPT, DecisionReport, Journal, describe
from autoscaler.limits import Counts
from autoscaler.model import Model
from autoscaler.policy import Decision, Proposal
from autoscaler.reasons import Reason
from planner.control import Snapshot
from planner.latency import PRESETS

SNAPSHOT = Snapshot(now=10.0, window=20.0, attention=2, ffn=2, running=3, arrival_rate=1.5)
MODEL = Model(PRESETS["deepseek-v3-npu"], error=0.07, why="")


def note(journal: Journal, decision: Decision, snapshot: Snapshot | None = SNAPSHOT):
    return journal.note(
        decision, snapshot, MODEL, policy="static", mode="on", wall=1e9, seconds=0.01
    )


def acted() -> Decision:
    there, target = Counts(2, 2), Counts(3, 2)
    proposal = Proposal(4, None, Reason.SLO_MISSED, "TPOT 0.3 s")
    reasons = (Reason.SLO_MISSED, Reason.STEP_CAPPED)
    return Decision(10.0, there, proposal, target, target, reasons, "TPOT 0.3 s")


def kept() -> Decision:
    there = Counts(2, 2)
    return Decision(12.0, there, Proposal(), there, None, (Reason.AS_IT_IS,))


def test_a_report_says_what_and_why(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal("verse")
    with caplog.at_level(logging.INFO, "afflux.controller"):
        report = note(journal, acted())
        note(journal, kept())
    assert (report.there, report.proposed, report.target) == ("2A2F", "4A2F", "3A2F")
    assert report.observed["rate"] == 1.5 and "ttft_p90_s" not in report.observed
    (line,) = caplog.messages
    assert DecisionReport.model_validate(json.loads(line)) == report, "only what changed something"


def test_reports_are_found_by_number_and_old_ones_go() -> None:
    journal = Journal("verse")
    for _ in range(KEPT + 5):
        note(journal, kept())
    assert len(journal.reports) == KEPT
    assert [r.number for r in journal.since(KEPT + 2)] == [KEPT + 3, KEPT + 4, KEPT + 5]
    assert [r.number for r in journal.since(0, 1)] == [KEPT + 5]


def test_metrics() -> None:
    journal = Journal("verse")
    note(journal, acted())
    note(journal, kept())
    text = generate_latest(journal.families.registry).decode()
    who = 'model_name="verse"'
    for line in (
        f'afd_controller_decisions_total{{{who},reason="slo_missed"}} 1.0',
        f'afd_controller_decisions_total{{{who},reason="stale_data"}} 0.0',
        f'afd_controller_advised_actors{{{who},role="attention"}} 2.0',
        f"afd_controller_advised_ratio{{{who}}} 1.0",
        f"afd_controller_acting{{{who}}} 1.0",
        f"afd_controller_model_error_ratio{{{who}}} 0.07",
        f"afd_controller_last_tick_timestamp_seconds{{{who}}} 1e+09",
    ):
        assert line in text, line
    assert not journal.families.missing


def test_a_blind_tick_needs_no_snapshot() -> None:
    nobody = Counts(0, 0)
    blind = Decision(1.0, nobody, None, nobody, None, (Reason.MANAGER_AWAY,), "away")
    report = note(Journal("verse"), blind, None)
    assert report.observed == {} and report.proposed is None and not report.acted


def test_a_model_is_plain_data() -> None:
    data = describe(MODEL)
    assert data is not None and data["theta"] is None and data["error"] == 0.07
    assert data["latencies"]["attention"]
    json.dumps(data, allow_nan=False)
    assert describe(None) is None
