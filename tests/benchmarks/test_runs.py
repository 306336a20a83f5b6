"""Both benchmarks against real deployments, short: nothing fails, no token is wrong."""

import json
from pathlib import Path

import pytest

from benchmarks import chaos, elastic

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.timeout(1200)]


def test_elastic(tmp_path: Path):
    path = tmp_path / "elastic.json"
    elastic.run(path, concurrency=4, hold_s=0.5, cycles=3)
    summary = json.loads(path.read_text())["summary"]
    assert summary["clean"], summary
    assert summary["script"] == "1A1F -> 2A1F -> 2A3F -> 1A2F -> 3A1F -> 1A1F"
    assert summary["commit_pause_ms"] > 0 and summary["flip_s"] > 0
    assert summary["grown_groups"] == 0
    assert path.with_suffix(".png").exists()


def test_chaos(tmp_path: Path):
    path = tmp_path / "chaos.json"
    chaos.run(path, kills=4, seed=3, requests=20, repeats=1, concurrency=4)
    summary = json.loads(path.read_text())["summary"]
    assert summary["clean"], summary
    assert summary["kills"] == 4 and summary["sent"] >= 20
    for scenario in chaos.SCENARIOS:
        assert summary[f"gap_{scenario.name}_s"] > 0
    assert path.with_suffix(".png").exists()
