"""Predictions for two cores beside runs: which settings, and what their figures say."""

import json
from pathlib import Path

import pytest

from benchmarks import kernels
from benchmarks import planner_two_cores as benchmark
from benchmarks.planner_two_cores import Row, middle, summarise
from planner.errors import PlannerError
from planner.explore.kernels.measured import MeasuredDB
from planner.explore.model import model_from_config
from planner.explore.two_cores import compare
from tests.benchmarks.test_kernels import TINY


def row(afd: tuple[float, float], aggregated: tuple[float, float], **changed) -> Row:
    """Each (predicted, measured)."""
    return Row(
        **{
            "model": "m", "batch": 8, "context": 80.0, "lanes_predicted": 1, "lanes_measured": 2,
            "afd_predicted": afd[0], "afd_measured": afd[1],
            "aggregated_predicted": aggregated[0], "aggregated_measured": aggregated[1],
        } | changed
    )  # fmt: skip


def test_the_winner_is_right_when_it_won():
    assert row((110, 100), (90, 95)).right
    assert row((90, 100), (100, 200)).right
    assert not row((110, 100), (100, 105)).right
    assert row((110, 100), (90, 95)).afd_error == pytest.approx(0.10)
    assert row((110, 100), (90, 95)).aggregated_error == pytest.approx(-5 / 95)


def test_the_figures_count_both_ways_of_all_settings():
    rows = [row((110, 100), (81, 90)), row((100, 100), (60, 80)), row((80, 100), (100, 90))]
    figures = summarise(rows)
    assert (figures["winner_right"], figures["winner_settings"]) == (2, 3)
    assert (figures["afd_wins"], figures["afd_wins_predicted"]) == (3, 2)
    # errors: 10 %, 10 %, 0, 25 %, 20 %, 11.1 %
    assert figures["throughput_median_error"] == pytest.approx((0.10 + 1 / 9) / 2, abs=1e-4)
    assert figures["throughput_max_error"] == pytest.approx(0.25)


def test_a_tie_of_wins_is_no_luck():
    """An equal share is not a win for AFD, predicted or measured."""
    assert row((100, 90), (100, 100)).right
    assert not row((100, 110), (100, 100)).right


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_settings_lie_within_what_is_measured(tmp_path: Path, dtype: str):
    assert sum(len(settings) for settings in benchmark.SETTINGS.values()) >= 12
    assert set(benchmark.SETTINGS) == set(kernels.MODELS)
    effort = kernels.Effort()
    for label, settings in benchmark.SETTINGS.items():
        shape, db = kernels.MODELS[label], grid(tmp_path, label, dtype, effort)
        room = kernels.room(shape, dtype)
        model = model_from_config("again", config(shape))
        for batch, context in settings:
            assert (batch, context) in kernels.fitting((batch,), (context,), room)
            assert compare(db, model, batch, middle(context)).afd_rate > 0


def config(shape: dict) -> dict:
    return {"intermediate_size": 1024, "vocab_size": 4096, **shape}


def grid(folder: Path, label: str, dtype: str, effort: kernels.Effort) -> MeasuredDB:
    """A file with all the places that the benchmark would have measured."""
    shape = kernels.MODELS[label]
    settings = kernels.fitting(effort.batches, effort.contexts, kernels.room(shape, dtype))
    smallest = [batch for batch, context in settings if context == min(effort.contexts)]
    entry = {
        "config": config(shape),
        "attention": [
            {"threads": t, "batch": b, "context": c + 4, "layers_s": 1e-3 * b, "outside_s": 1e-3}
            for t in (1, 2) for b, c in settings
        ],
        "experts": [
            {"threads": t, "held": shape["num_experts"], "tokens": n, "seconds": 1e-3 * n}
            for t in (1, 2) for n in effort.batches
        ],
        "hop": [
            {"tokens": n, "attention_s": 1e-5, "wire_s": 1e-5, "ffn_s": 1e-5} for n in smallest
        ],
    }  # fmt: skip
    path = folder / f"{label}-{dtype}.json"
    path.write_text(
        json.dumps({"summary": {"machine": "m"}, "details": {"models": {label: entry}}})
    )
    return MeasuredDB(path)


def test_a_file_without_the_model_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = kernels.Place("cpu", "float32", (0, 1), (1, 2))
    monkeypatch.setattr(kernels, "find_place", lambda: place)
    monkeypatch.setattr(kernels, "MODELS", {"tiny": TINY})
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"summary": {"machine": "m"}, "details": {"models": {}}}))
    with pytest.raises(PlannerError, match="tiny is not in"):
        benchmark.run(kernels_path=path, settings={"tiny": ((8, 64),)})


def test_a_gpu_is_no_two_cores(monkeypatch: pytest.MonkeyPatch):
    place = kernels.Place("cuda", "bfloat16", None, (1,))
    monkeypatch.setattr(kernels, "find_place", lambda: place)
    with pytest.raises(ValueError, match="two cores"):
        benchmark.run()


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_tiny_model_is_predicted_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MODELS", {"tiny": TINY})
    path = tmp_path / "report.json"
    report = benchmark.run(
        path,
        settings={"tiny": ((8, 64), (16, 100))},
        effort=kernels.Effort((2, 4, 8, 16), (64, 320), 1.0),
    )
    assert report["summary"]["winner_settings"] == 2
    rows = json.loads(path.read_text())["details"]["rows"]
    assert all(row["afd_measured"] > 0 and row["aggregated_measured"] > 0 for row in rows)
    assert [row["batch"] for row in rows] == [8, 16]
