"""The grid of workloads: what is in it, and that a few come out as they should."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import sizing
from benchmarks.sizing import GridResult, Times, _outcome, grid_items
from planner.sizing import Setting, optimum

ROOT = Path(__file__).parents[2]
TRACES = ROOT.parent / "shared" / "data"


def small(items):
    """Short outputs and small batches: quick to simulate."""
    return [i for i in items if i.batch == 32 and i.workload.mean_output <= 250]


def test_the_grid_is_large_enough_without_traces(tmp_path: Path) -> None:
    items, used = grid_items(tmp_path, seed=0)
    assert len(items) >= 200
    assert used == ()
    assert {i.lanes for i in items} == {2, 3}
    assert {i.batch for i in items} == set(sizing.BATCHES)
    assert len({i.name for i in items}) == len(items)
    assert any("stand-in" in i.family for i in items)


@pytest.mark.skipif(not TRACES.is_dir(), reason="no ../shared/data with the recorded traces")
def test_both_traces_take_part() -> None:
    items, used = grid_items(TRACES, seed=0)
    assert len(items) >= 200
    assert used == tuple(sizing.TRACES.values())
    theta = {i.family: i.workload.moments().theta for i in items}
    assert round(theta["azure"]) == 1226
    assert round(theta["mooncake"]) == 13125


def test_latencies_are_what_they_say(tmp_path: Path) -> None:
    items, _ = grid_items(tmp_path, seed=0)
    for times in sizing.TIMES[1:]:
        item = next(i for i in items if i.times == times.name)
        moments = item.workload.moments()
        assert item.latencies.attention(item.batch * moments.theta) == pytest.approx(1000)
        at = optimum(
            Setting(moments, item.latencies, item.batch), "mean-field", item.ffn
        ).candidates["attention = ffn"]
        assert at == pytest.approx(times.ratio, rel=1e-6)
        assert 24 <= item.ffn * times.ratio <= 45


def test_outcomes_and_their_report(tmp_path: Path) -> None:
    chosen = small(grid_items(tmp_path, seed=0)[0])[::4][:4]
    assert len(chosen) >= 3
    chosen[0] = replace(chosen[0], check=True)
    outcomes = tuple(_outcome(item, quick=True) for item in chosen)
    assert sum(o.within for o in outcomes) >= len(outcomes) - 1
    assert all(o.loss < 0.03 for o in outcomes)
    assert all(abs(o.step_error) < 0.1 for o in outcomes)
    assert outcomes[0].simulator_error == pytest.approx(0.0, abs=0.03)
    found = GridResult(outcomes, ())
    summary = found.summary()
    assert summary["grid_size"] == len(chosen)
    assert summary["grid_within_10pct"] == sum(o.within for o in outcomes) / len(outcomes)
    json.dumps(found.to_dict())
    for _, columns, rows in found.tables():
        assert all(len(row) == len(columns) for row in rows)
    sizing.draw(found, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 10_000


def test_a_miss_has_a_reason(tmp_path: Path) -> None:
    item = small(grid_items(tmp_path, seed=0)[0])[0]
    outcome = _outcome(item, quick=True)
    missed = replace(outcome, error=0.2, within=False, loss=0.001, skewness=0.8)
    why = sizing._why(missed)
    assert "skewness 0.80" in why and "flat top" in why
    assert sizing._why(replace(missed, skewness=0.0, loss=0.02, step_error=0.0)) != ""


def test_times_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Times("x", 1, 0, 0, 0, "ffn").ratio = 2  # type: ignore[misc]
