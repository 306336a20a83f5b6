"""The data plane benchmark runs end to end and fills its summary (speed is not judged here)."""

import json

from benchmarks.dataplane import Effort, run


def test_summary_has_the_promised_figures(tmp_path):
    path = tmp_path / "dataplane.json"
    run(path, tokens=(64, 2048), effort=Effort(rounds=1, small=10, large=1))
    summary = json.loads(path.read_text())["summary"]
    for key in ("rtt_us_p50_64x2048", "raw_rtt_us_p50", "bandwidth_ratio_8mib", "memcpy_us_p50"):
        assert summary[key] > 0
