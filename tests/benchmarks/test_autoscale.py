"""The day's benchmark on a few minutes of a made-up trace."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaler import day, hindsight
from autoscaler.limits import Limits
from autoscaler.replay import run
from benchmarks import autoscale
from planner.errors import PlannerError


@pytest.fixture
def traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An hour as the real one's file has it, and few numbers of actors to search."""
    rng = np.random.default_rng(0)
    rows = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for at in sorted(rng.uniform(0, 3600, 2000)):
        rows.append(f"{at:.3f},{rng.integers(100, 2000)},{rng.integers(5, 100)}")
    (tmp_path / day.CASES["azure"].file).write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(day, "LIMITS", Limits((1, 4), (1, 2)))
    return tmp_path


def test_a_short_day_gives_a_report_and_a_picture(traces: Path, tmp_path: Path) -> None:
    out = tmp_path / "autoscale.json"
    report = autoscale.run_days(
        out, cases=["azure"], policies=["slo_feedback", "static"], hours=0.2, jobs=1, traces=traces
    )
    summary = report["summary"]
    for key in ("attainment", "attainment_best_static", "actor_seconds", "saved", "policy"):
        assert f"azure_{key}" in summary
    assert summary["azure_actor_seconds_best_static"] > 0
    # There is but one hour.
    assert summary["azure_saved_hourly"] == pytest.approx(0.0, abs=1e-9)
    assert summary["azure_attainment_hourly"] == summary["azure_attainment_best_static"]
    # It starts from the best static's numbers and keeps them.
    assert summary["azure_static_saved"] == pytest.approx(0.0, abs=1e-9)
    assert summary["azure_static_attainment"] == summary["azure_attainment_best_static"]
    assert json.loads(out.read_text())["details"]["azure"]["note"].startswith("a day made of")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_it_goes_on_where_it_was_but_only_for_the_same_day(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated: list[object] = []
    for module in (autoscale, hindsight):
        monkeypatch.setattr(
            module, "run", lambda scenario, *a, **k: simulated.append(1) or run(scenario, *a, **k)
        )

    def again() -> tuple[int, dict[str, Any]]:
        simulated.clear()
        report = autoscale.run_days(
            cases=["azure"],
            policies=["slo_feedback"],
            hours=0.1,
            jobs=1,
            traces=traces,
            resume=tmp_path / "finished.jsonl",
        )
        return len(simulated), {k: v for k, v in report["summary"].items() if k != "seconds"}

    many, first = again()
    assert many > 1 and again() == (0, first)
    monkeypatch.setattr(day, "LIMITS", Limits((1, 3), (1, 2)))
    assert again()[0] > 0, "other limits"
    file = traces / day.CASES["azure"].file
    file.write_text("\n".join(file.read_text().splitlines()[:-50]) + "\n")
    assert again()[0] > 0, "other requests"


def test_unknown_traces_are_named(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="azure, azure4x, mooncake"):
        autoscale.run_days(cases=["nowhere"], traces=tmp_path)
