"""``afflux size`` and ``afflux fit`` as a user runs them: tables, JSON, pictures, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from afflux.main import app
from afflux.planning import many, number, one, percent, plain
from afflux.size import MOST_SIMULATED, simulated_counts
from cluster.paths import project_root
from planner.latency import PRESETS, load_latencies

run = CliRunner().invoke
PAPER = ["--workload", "fixed:100,geometric:500", "--latency", "deepseek-v3-npu", "--batch", "256"]
SMALL = ["--workload", "fixed:40,geometric:12", "--latency", "deepseek-v3-npu", "--batch", "16"]
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def ask(*words: str) -> str:
    result = run(app, ["size", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def trace_file(folder: Path, rows: str) -> str:
    file = folder / "trace.csv"
    file.write_text(TRACE + rows)
    return str(file)


def test_help_loads_nothing_of_the_planner() -> None:
    code = (
        "import sys, afflux.main;"
        "print([m for m in ('numpy', 'scipy', 'matplotlib', 'planner.sizing') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_papers_case(tmp_path: Path) -> None:
    text = ask(*PAPER, "--json", str(tmp_path / "size.json"))
    for words in ("theta 599 tokens per slot", "v1", "mean field", "barrier, 2 lanes", "best"):
        assert words in text
    report = json.loads((tmp_path / "size.json").read_text())
    summary = report["summary"]
    assert summary["bench"] == "size" and summary["unit"] == "cycles"
    assert summary["r_star_v1"] == pytest.approx(9.57, abs=0.01)
    assert summary["r_star_mean_field"] == pytest.approx(9.55, abs=0.01)
    assert summary["attention"] == round(summary["r_star"])
    assert {effect["name"] for effect in report["details"]["sensitivity"]} >= {"a_A", "b_F", "nu2"}


def test_every_table_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = ask(*SMALL, "--budget", "12")
    assert "…" not in text


@pytest.mark.parametrize(("form", "attention"), [("v1", 10), ("mean-field", 9)])
def test_another_form_chooses_and_says_what_it_loses(
    form: str, attention: int, tmp_path: Path
) -> None:
    text = ask(*PAPER, "--form", form, "--json", str(tmp_path / "size.json"))
    name = form.replace("-", " ")
    assert f"Whole workers: {attention}A1F, by {name}" in text
    summary = json.loads((tmp_path / "size.json").read_text())["summary"]
    assert summary["attention"] == attention
    assert summary["loss"] > 0


def test_more_lanes_hide_the_round_trip(tmp_path: Path) -> None:
    ratios = []
    for lanes in ("2", "3"):
        file = tmp_path / f"{lanes}.json"
        assert f"barrier, {lanes} lanes" in ask(*PAPER, "--lanes", lanes, "--json", str(file))
        ratios.append(json.loads(file.read_text())["summary"]["r_star"])
    assert ratios[0] < ratios[1]


def test_a_budget_lists_choices_and_separate_deployments(tmp_path: Path) -> None:
    file = tmp_path / "size.json"
    text = ask(*PAPER, "--budget", "32", "--json", str(file))
    assert "Within the budget" in text
    assert "separate deployments of 7A1F" in text
    report = json.loads(file.read_text())
    assert report["summary"]["budget_gpus"] <= 32
    best = report["details"]["plan"]["best"]["point"]
    assert best["attention"] + best["ffn"] == report["summary"]["budget_gpus"]
    bigger = ask(*PAPER, "--budget", "32", "--attention-gpus", "2", "--ffn-gpus", "8")
    assert "best" in bigger


def test_a_trace_has_an_interval(tmp_path: Path) -> None:
    rows = "".join(f"{i}.5,{100 + i},{1 + i % 7}\n" for i in range(40))
    text = ask("--trace", trace_file(tmp_path, rows), *SMALL[2:])
    assert "40 requests" in text
    assert "with 95% confidence" in text


def test_prefill_in_front_is_shown_where_its_times_are_known(tmp_path: Path) -> None:
    data = json.loads(PRESETS["deepseek-v3-npu"].to_json())
    data["prefill"] = {"kind": "linear", "a": 0.5, "b": 10.0}
    file = tmp_path / "latency.json"
    file.write_text(json.dumps(data))
    assert "in front: " in ask(*SMALL[:2], "--latency", str(file), "--batch", "16")
    assert "in front: " not in ask(*SMALL)


def test_simulation_beside_the_theory_and_a_picture(tmp_path: Path) -> None:
    json_file, png = tmp_path / "size.json", tmp_path / "size.png"
    files = ["--json", str(json_file), "--png", str(png)]
    text = ask(*SMALL, "--simulate", "--requests", "200", *files)
    assert "Theory (barrier, 2 lanes) / simulation" in text
    report = json.loads(json_file.read_text())
    rows = report["details"]["simulated"]
    assert len(rows) >= 4
    assert report["summary"]["attention"] in [row["attention"] for row in rows]
    assert png.read_bytes().startswith(b"\x89PNG")


@given(st.floats(1e-3, 5000), st.integers(1, 5000))
def test_simulated_counts_are_whole_and_hold_the_chosen_one(best: float, chosen: int) -> None:
    counts = simulated_counts(best, chosen)
    assert counts == sorted(set(counts))
    assert counts[0] >= 1
    assert min(chosen, MOST_SIMULATED) in counts
    assert counts[-1] <= MOST_SIMULATED


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "neither was given"),
        ([*SMALL, "--trace", "x.csv"], "both were given"),
        ([*SMALL[:2], "--batch", "16"], "expected a file or a preset (deepseek-v3-npu)"),
        (SMALL[:4], "missing; as in --batch 256"),
        ([*SMALL[:5], "-3"], "--batch"),
        ([*SMALL, "--max-tpot", "9"], "give --budget too"),
        ([*SMALL, "--png", "x.txt"], "x.txt is no picture"),
        ([*SMALL, "--form", "v3"], "v3"),
        (["--reproduce", "1234.5678"], "expected 2601.21351"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_what_is_expected(words: list[str], text: str) -> None:
    result = run(app, ["size", *words])
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--workload": "nonsense"}, "unknown workload 'nonsense'"),
        ({"--workload": "fixed:100"}, "1 length(s) in 'fixed:100'"),
        ({"--latency": "nonsense"}, "neither a preset (deepseek-v3-npu) nor a file"),
        ({"--ffn-price": "-1"}, "price_ffn is -1.0, expected a number above 0"),
        ({"--json": "{folder}/file/x.json"}, "cannot write"),
        ({"--budget": "1"}, "give more GPUs"),
        ({"--budget": "8", "--kv-tokens": "10"}, "not even a batch of 1 fits"),
    ],
)
def test_bad_input_is_one_clear_line(change: dict[str, str], text: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options = dict(zip(SMALL[::2], SMALL[1::2], strict=True)) | change
    words = [word.format(folder=tmp_path) for pair in options.items() for word in pair]
    result = run(app, ["size", *words])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert text in result.stderr
    assert "not foreseen" not in result.stderr


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ("", "no request"),
        ("1,2,3\n2,oops,3\n", "line 3: ContextTokens is 'oops'"),
        ("1,2,3\n2,-5,3\n", "line 3: ContextTokens is"),
    ],
)
def test_a_malformed_trace_is_named_with_its_line(rows: str, text: str, tmp_path: Path) -> None:
    result = run(app, ["size", "--trace", trace_file(tmp_path, rows), *SMALL[2:]])
    assert result.exit_code == 1
    assert text in result.stderr
    assert "trace.csv" in result.stderr


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (["size", "--reproduce", "2601.21351"], {"seed": 0}),
        (["size", "--reproduce", "arXiv:2601.21351", "--seed", "3"], {"seed": 3}),
        (
            ["bench", "sizing", "--quick", "--jobs", "1", "--seed", "2"],
            {"quick": True, "jobs": 1, "seed": 2},
        ),
    ],
)
def test_reproduce_and_bench_are_the_same_benchmark(
    command: list[str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import benchmarks

    asked: list[Any] = []

    def stand_in(json_path: Path, png_path: Path | None, **more: Any) -> None:
        more.pop("progress")("half", 0.5)
        asked.append((json_path, png_path, more))

    module = SimpleNamespace(run=stand_in)
    monkeypatch.setitem(sys.modules, "benchmarks.sizing", module)
    monkeypatch.setattr(benchmarks, "sizing", module, raising=False)
    file = tmp_path / "s.json"
    assert run(app, [*command, "--json", str(file)]).exit_code == 0
    path, png, more = asked[0]
    assert (path, png) == (file, None)
    assert {key: more[key] for key in options} == options


DECODE = project_root() / "benchmarks" / "results" / "decode.json"


def telemetry(folder: Path) -> str:
    rows: list[dict[str, Any]] = []
    for load in (1, 8, 64, 256):
        rows.append({"stage": "ffn", "load": load, "seconds": 0.01 + 1e-4 * load})
        rows.append({"stage": "transfer", "load": load, "seconds": 0.001 + 1e-6 * load})
        for length in (100, 1000):
            tokens = load * length
            seconds = 0.005 + 2e-7 * tokens + 1e-5 * load
            row = {"stage": "attention", "load": tokens, "requests": load, "seconds": seconds}
            rows.append(row)
    file = folder / "telemetry.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_fit_writes_what_size_reads(tmp_path: Path) -> None:
    file = tmp_path / "new" / "latency.json"
    result = run(app, ["fit", telemetry(tmp_path), "--json", str(file)])
    assert result.exit_code == 0, result.output
    for word in ("attention", "ffn", "transfer", "outliers", f"--latency {file}"):
        assert word in result.stdout
    latencies = load_latencies(str(file))
    assert latencies.t_ffn(100.0) == pytest.approx(0.02, rel=0.02)
    ask(*SMALL[:2], "--latency", str(file), "--batch", "16")


def test_measurements_may_be_given_as_latencies_directly(tmp_path: Path) -> None:
    result = run(app, ["size", *SMALL[:2], "--latency", telemetry(tmp_path), "--batch", "16"])
    assert result.exit_code == 0, result.output
    assert "fitted to telemetry.jsonl" in result.stderr
    assert "tokens/s" in result.stdout


def test_fit_reads_the_decode_benchmark(tmp_path: Path) -> None:
    result = run(app, ["fit", str(DECODE), "--model", "balanced"])
    assert result.exit_code == 0, result.output
    assert "Whole steps of one attention and one FFN worker" in result.stdout
    which = run(app, ["fit", str(DECODE)])
    assert which.exit_code == 1
    assert "holds models balanced, ffn_heavy; choose one" in which.stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: can't be read"),
        (["{latency}"], "holds latencies already"),
        (["{telemetry}", "--model", "x"], "--model is for the JSON of 'afflux bench decode'"),
        (["{telemetry}", "{decode}"], "expected one such file"),
        (["{bad}"], "bad.jsonl:1: not JSON"),
    ],
)
def test_fit_refuses_with_one_clear_line(words: list[str], text: str, tmp_path: Path) -> None:
    (tmp_path / "latency.json").write_text(PRESETS["deepseek-v3-npu"].to_json())
    (tmp_path / "bad.jsonl").write_text("{oops\n")
    places = {
        "telemetry": telemetry(tmp_path),
        "decode": str(DECODE),
        "latency": str(tmp_path / "latency.json"),
        "bad": str(tmp_path / "bad.jsonl"),
    }
    result = run(app, ["fit", *(word.format(**places) for word in words)])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert text in result.stderr


def test_numbers_are_short() -> None:
    assert [number(x) for x in (None, float("nan"), float("inf"), 0.70912, 12345.6, 9.5)] == [
        "-", "-", "∞", "0.7091", "12,346", "9.5",
    ]  # fmt: skip
    assert [percent(x) for x in (None, float("nan"), 0.1234)] == ["-", "-", "12.3 %"]
    assert [many(1, "lane"), many(2, "lane")] == ["1 lane", "2 lanes"]
    assert [one("cycles"), one("s"), one("ms")] == ["cycle", "s", "ms"]


def test_json_has_no_infinities() -> None:
    import numpy as np

    data = {"a": float("inf"), "b": [float("nan"), 1.5], "c": np.float64(2), "d": np.arange(2)}
    assert plain(data) == {"a": None, "b": [None, 1.5], "c": 2.0, "d": [0, 1]}
