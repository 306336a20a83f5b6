"""The model of a decode benchmark, on a report whose times are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autoscaler.benchmarked import model_of
from autoscaler.policy import System
from autoscaler.predict import predict_step
from planner.curves import Linear
from planner.errors import PlannerError
from planner.latency import Latencies

LAYERS = 8
TRUE = Latencies(
    Linear(2e-5, 4e-3), Linear(2e-3, 8e-3), Linear(1e-4, 2e-3), outside=Linear(1e-4, 5e-3)
)


def report(noise: float = 0.0) -> dict[str, Any]:
    """As ``afflux bench decode`` writes it; steps are off by a lognormal ``noise``."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for context in (40.0, 200.0):
        for batch in (1, 8, 32, 64):
            for lanes in (1, 2):
                if lanes > batch:
                    continue
                x = batch / lanes
                a, f, c = TRUE.t_attention(context * x, x), TRUE.t_ffn(x), TRUE.t_transfer(x)
                stages = {"attention": a, "ffn": f, "transfer": c}
                for stage, seconds in stages.items():
                    row = {"stage": stage, "seconds": seconds / LAYERS, "layers": LAYERS, "load": x}
                    if stage == "attention":
                        row |= {"load": context * x, "requests": x}
                    rows.append(row)
                step = max(lanes * max(a, f, c), a + f + c) + TRUE.outside(batch)
                step *= float(rng.lognormal(0.0, noise))
                rows.append(
                    {
                        "stage": "step",
                        "seconds": step,
                        "load": context * batch,
                        "requests": batch,
                        "lanes": lanes,
                    }
                )
    entry = {"layers": LAYERS, "rows": [], "samples": rows}
    return {"summary": {}, "details": {"one": entry}}


def written(path: Path, **given: Any) -> Path:
    path.write_text(json.dumps(report(**given)), encoding="utf-8")
    return path


def test_settings_are_predicted(tmp_path: Path) -> None:
    found = model_of(written(tmp_path / "split.json"))
    assert found.model.reliable and found.model.error < 0.05
    assert found.held_out_error < 0.1
    assert len(found.settings) == 14
    assert {setting.lanes for setting in found.settings} == {1, 2}
    assert found.model.layers == LAYERS and found.model.samples["ffn"] == 14
    low, high = found.model.intervals["ffn.a"]
    assert low <= 2e-3 * 1.001 and high >= 2e-3 * 0.999
    setting = next(s for s in found.settings if s.requests == 64 and s.lanes == 1)
    assert setting.predicted == pytest.approx(setting.observed * (1 + setting.error))
    # and so are numbers of workers that were never measured
    assert predict_step(found.model, System(64), 1, 4, 64) < setting.predicted


def test_it_says_that_it_is_not_reliable(tmp_path: Path) -> None:
    found = model_of(written(tmp_path / "split.json", noise=2.0))
    assert not found.model.reliable and "off by" in found.model.why


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(PlannerError, match="bench decode"):
        model_of(path)


@pytest.mark.parametrize(("name", "layers"), [("balanced", 24), ("ffn_heavy", 8)])
def test_the_recorded_benchmark_is_predicted_within_a_tenth(name: str, layers: int) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "results" / "decode.json"
    found = model_of(path, name, layers=layers)
    assert len(found.settings) >= 5
    assert found.model.reliable and found.model.error < 0.1
