"""A recorded `bench slo` beside the simulator: what counts as near, and as explained."""

import json
from pathlib import Path

import pytest

from benchmarks.attainment import Change
from benchmarks.slo_model import measured
from benchmarks.slo_replay import FIGURES, compared, level_of, run, run_of
from planner.curves import Linear
from planner.latency import Latencies


def figures(tokens: float, p50: float, p90: float) -> dict[str, float]:
    return dict(zip(FIGURES, (tokens, p50, p90), strict=True))


def test_near_is_explained_and_far_only_within_the_range():
    measured = figures(100, 1.0, 2.0) | {"name": "3A5F"}
    row = compared(measured, figures(120, 0.8, 0.9), figures(108, 1.3, 1.1), figures(80, 1.9, 1.8))
    assert row["run"] == "3A5F"
    assert [row[key]["within"] for key in FIGURES] == [True, False, False]
    assert [row[key]["explained"] for key in FIGURES] == [True, True, False]
    assert (row["tpot_p90_s"]["low"], row["tpot_p90_s"]["high"]) == (0.9, 1.8)


def test_a_run_begins_and_changes_as_recorded():
    change = {"at": 12.5, "attention": 10, "ffn": 2, "to": "10A2F", "took_s": 1.0}
    one = run_of({"name": "x", "policy": True, "begins_at": "4A12F", "changes": [change]})
    assert one.begin == (4, 12) and one.changes == [Change(12.5, 10, 2)]


def test_a_models_level_is_taken_out_of_it():
    """It is the predictor's, at the load of the run's end."""
    stages = Latencies(Linear(3e-4, 0.2), Linear(0.02, 0.03), Linear(0.0, 0.01))
    emulated = {"attention": {"a_s": 5e-5}}
    model = {"latencies": json.loads(stages.to_json())}
    assert level_of(model, emulated, layers=4) == pytest.approx(1.5)
    assert level_of(model | {"level": 0.8}, emulated, layers=4) == 0.8
    assert measured(model | {"level": 2.0}).ffn(1.0) == pytest.approx(stages.ffn(1.0) / 2)
    assert measured(model).attention(100.0) == stages.attention(100.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda report: report.pop("summary"), "lacks 'summary'"),
        (lambda report: report["summary"].update(seconds=401.0), "requests in"),
        (lambda report: report["details"]["scenario"]["phases"].pop(), "--seed"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change, message: str):
    phases = [{"name": "chat", "begins_s": 0, "requests": 2068}, {"name": "chat", "requests": 1}]
    targets = {"ttft_target_s": 4.0, "tpot_target_s": 1.1}
    report = {
        "summary": {"scenario": "shift", "seconds": 400.0, **targets},
        "details": {"scenario": {"phases": phases}, "runs": []},
    }
    change(report)
    path = tmp_path / "slo.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match=message):
        run(path)
