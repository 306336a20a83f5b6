"""Runs replayed in the simulator: where the truth is known, fit and replay must meet it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replay import replay, summary
from benchmarks.samples import _stage_rows
from planner.fitting import step_time
from planner.latency import Latencies, Linear
from planner.loads import Arrival, Arrivals
from planner.simulator import Cluster, simulate

LAYERS, PROMPT = 8, 32
TRUTH = Latencies(
    attention=Linear(1e-7, 2e-3),
    attention_per_request=2e-4,
    ffn=Linear(2e-4, 3e-3),
    transfer=Linear(1e-5, 1e-3),
    prefill=Linear(5e-5, 1e-3),
    outside=Linear(1e-5, 1e-3),
)
BARE = Latencies(
    TRUTH.attention, TRUTH.ffn, TRUTH.transfer, attention_per_request=2e-4, prefill=TRUTH.prefill
)


def samples() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"stage": "prefill", "seconds": TRUTH.t_prefill(n) / LAYERS, "load": n, "layers": LAYERS}
        for n in (256.0, 1024.0, 2048.0)
    ]
    for each in (40.0, 420.0):
        for batch in (1, 8, 32, 128):
            for lanes in (lanes for lanes in (1, 2, 3) if lanes <= batch):
                n = batch / lanes
                attention = BARE.t_attention(n * each, n) / LAYERS
                layered: dict[str, Any] = {"layers": LAYERS, "load": n}
                rows += [
                    {
                        "stage": "attention",
                        "seconds": attention,
                        "load": n * each,
                        "requests": n,
                        "layers": LAYERS,
                    },
                    {"stage": "ffn", "seconds": TRUTH.t_ffn(n) / LAYERS, **layered},
                    {"stage": "transfer", "seconds": TRUTH.t_transfer(n) / LAYERS, **layered},
                    {
                        "stage": "step",
                        "seconds": step_time(
                            BARE, batch * each, batch, lanes, outside=TRUTH.outside(batch)
                        ),
                        "load": batch * each,
                        "requests": batch,
                        "lanes": lanes,
                    },
                ]
    return rows


def run(batch: int, lanes: int) -> dict[str, Any]:
    outputs = [8 + i % 30 for i in range(batch)]
    cluster = Cluster(
        TRUTH,
        attention=1,
        batch=-(-batch // lanes),
        lanes=lanes,
        layers=LAYERS,
        boarding="asynchronous",
        steps="joint",
        prefill="colocated",
        prefill_chunk=2048 // lanes,
    )
    result = simulate(cluster, Arrivals([Arrival(0.0, PROMPT, output) for output in outputs]))
    return {
        "batch": batch,
        "lanes": lanes,
        "prompt": PROMPT,
        "outputs": outputs,
        "seconds": result.makespan,
        "tpot_p50_s": result.tpot.p50,
        "tpot_p90_s": result.tpot.p90,
    }


def test_what_is_known_is_found_again(tmp_path: Path):
    entry = {
        "rows": [],
        "layers": LAYERS,
        "samples": samples(),
        "runs": [run(8, 1), run(32, 2), run(32, 2), run(100, 3)],
    }
    path = tmp_path / "decode.json"
    path.write_text(json.dumps({"details": {"known": entry}}))
    rows, _ = replay(path)
    assert [(row.batch, row.lanes) for row in rows] == [(8, 1), (32, 2), (100, 3)]
    assert max(v for k, v in summary(rows).items() if k.endswith("max_error")) < 0.03


def test_rows_of_decode_and_of_prompts_are_told_apart():
    kept = {
        "attention": [(4.0, 1.0), (4.0, 3.0), (4.0, 2.0), (512.0, 9.0)],
        "ffn": [(4.0, 5.0), (512.0, 50.0)],
        "transfer": [(4.0, 0.5), (512.0, 5.0)],
    }
    rows = list(_stage_rows(kept, batch=8, lanes=2, tokens_each=100.0, layers=3))
    assert rows == [
        {"stage": "attention", "seconds": 2.0, "layers": 3, "load": 400.0, "requests": 4.0},
        {"stage": "prefill", "seconds": 9.0, "layers": 3, "load": 512.0},
        {"stage": "ffn", "seconds": 5.0, "layers": 3, "load": 4.0},
        {"stage": "ffn", "seconds": 50.0, "layers": 3, "load": 512.0},  # a token is a token
    ]
    assert [r["stage"] for r in _stage_rows(kept, 8, 1, 100.0, 3)].count("transfer") == 1


def test_an_empty_report_is_refused(tmp_path: Path):
    path = tmp_path / "decode.json"
    path.write_text('{"details": {}}')
    with pytest.raises(ValueError, match="no runs"):
        replay(path)
