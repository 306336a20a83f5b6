"""``afflux plan`` as a user runs it: verdict, tables, JSON, pictures, specs, mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from afflux import plan
from afflux.main import app
from afflux.plan_given import duration
from cluster.spec import load_spec
from planner.errors import PlannerError
from planner.explore.kernels import aic
from planner.explore.points import SHAPES, Mode
from planner.explore.question import Exploration
from planner.explore.winner_sensitivity import Moved
from tests.planner.explore.explorations import AFD_WINS, NOTHING, exploration, point

run = CliRunner().invoke
CHAT = [
    *("--model", "deepseek-ai/DeepSeek-V3.2", "--system", "b200_sxm", "--gpus", "128"),
    *("--workload", "chat", "--ttft", "50ms", "--tpot", "15ms", "--kernels", "roofline"),
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A search that answers every question with the same points; what it was asked."""
    asked: list[Any] = []

    def search(one: Any, jobs: Any, resume: Any, progress: Callable[..., None]) -> Exploration:
        progress("searching", 0.5)
        asked.append(one)
        best = dict(NOTHING if one.question.gpus < 32 else AFD_WINS)
        if one.question.shape.name == "coding":
            best[Mode.PD] = point(Mode.PD, 5000.0)
        return replace(exploration(best), question=one.question)

    monkeypatch.setattr(plan, "_search", search)
    return asked


def ask(*words: str) -> str:
    result = run(app, ["plan", *words])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: str) -> str:
    result = run(app, ["plan", *words])
    assert result.exit_code != 0, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


def but(**changed: str) -> list[str]:
    """``CHAT`` with other values of some options."""
    words = list(CHAT)
    for name, value in changed.items():
        option = f"--{name.replace('_', '-')}"
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    return words


def test_help_loads_nothing_of_the_planner() -> None:
    code = (
        "import sys, afflux.main;"
        "print([m for m in ('numpy', 'plotly', 'planner.explore.points') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verdict_tables_and_json(searched: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    text = ask(*CHAT, "--json", str(file))
    for words in (
        "AFD pays: 3,970 tokens/s on 128 GPUs (16A+112F), 5.2 times P/D with AFD",
        "Best of each level within the targets",
        "What the GPUs do",
        "AFD: times 90 % measured, 10 % interpolated",
        "Levels that do not hold the targets",
        "4,096 tokens cached, 512 of prompt, 256 of output",
        "TTFT 50 ms, TPOT 15 ms",
    ):
        assert words in text
    report = json.loads(file.read_text())
    summary = report["summary"]
    assert summary["bench"] == "plan" and summary["winner"] == "afd"
    assert summary["afd_tokens_per_s"] == 3970 and summary["pd_refused"] == "tpot"
    assert summary["disaggregation_pays"] is True
    (answer,) = report["details"]["answers"]
    assert answer["best"]["afd"]["counts"] == "16A+112F"
    assert answer["best"]["afd"]["shares"] == {"measured": 0.9, "interpolated": 0.1}
    assert len(answer["frontier"]["afd"]) == 3
    assert answer["question"]["options"]["pd_ttft"] == 1.8


def test_every_table_fits_eighty_columns(
    searched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = ask(*CHAT)
    assert "…" not in text
    tables = text[text.index("Best of each") : text.index("Levels that do not")]
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= 80


def test_inputs_reach_the_question(searched: list[Any]) -> None:
    ask(
        *but(workload="100:200:300", ttft="0.2s", tpot="20", network="cluster=50,20us"),
        *("--modes", "agg,afd", "--overlap", "paper", "--fan", "paper", "--lanes", "2"),
        *("--router-on", "ffn", "--p99", "--half-duplex", "--prefill-rate", "0.8"),
        *("--ffn-system", "h200_sxm", "--wire-bytes", "1", "--allow-extrapolation"),
    )
    (asked,) = searched
    question = asked.question
    assert (question.shape.prefix, question.shape.prompt, question.shape.output) == (100, 200, 300)
    assert (question.targets.ttft, question.targets.tpot) == pytest.approx((0.2, 0.020))
    tier = question.system.tier("cluster")
    assert (tier.bandwidth, tier.latency) == (50e9, pytest.approx(20e-6))
    assert question.modes == (Mode.AGGREGATED, Mode.AFD)
    options = question.options
    assert (options.overlap, options.fan, options.lanes) == ("paper", "paper", (2,))
    assert options.sides.router == "ffn" and options.sides.shared == "attention"
    assert options.percentile == "p99" and not options.full_duplex
    assert (options.prefill_rate, options.wire_bytes) == (0.8, 1.0)
    assert options.allow_extrapolation
    assert question.ffn_system.name == "h200_sxm" and asked.ffn_db is not None


def test_named_workloads_have_their_strict_targets(searched: list[Any]) -> None:
    words = but(workload="agentic")
    del words[words.index("--ttft") : words.index("--kernels")]
    ask(*words)
    assert searched[0].question.targets == SHAPES["agentic"][1]


def test_two_workloads_side_by_side(searched: list[Any], tmp_path: Path) -> None:
    png, html, file = (tmp_path / name for name in ("p.png", "p.html", "p.json"))
    words = [*CHAT, "--compare", "workload=coding", "--compare", "gpus=16"]
    text = ask(*words, "--png", str(png), "--html", str(html), "--json", str(file))
    assert "Side by side, tokens/s within the targets" in text
    assert "workload=coding: P/D pays: 5,000 tokens/s" in text
    assert "gpus=16: No level holds" in text
    assert png.stat().st_size > 10_000 and b"Plotly" in html.read_bytes()
    assert len(json.loads(file.read_text())["details"]["answers"]) == 3
    assert [one.question.gpus for one in searched] == [128, 128, 16]


@pytest.mark.parametrize(
    ("text", "get", "value"),
    [
        ("system=h200_sxm", lambda q: q.system.name, "h200_sxm"),
        ("network=cluster=25", lambda q: q.system.tier("cluster").bandwidth, 25e9),
        ("ffn-system=h200_sxm", lambda q: q.ffn_system.name, "h200_sxm"),
        ("model=Qwen/Qwen3-30B-A3B", lambda q: q.model.experts, 128),
        ("tpot=30", lambda q: q.targets.tpot, 0.03),
    ],
)
def test_what_can_be_compared(
    searched: list[Any], text: str, get: Callable[[Any], Any], value: Any
) -> None:
    ask(*CHAT, "--compare", text)
    assert get(searched[1].question) == pytest.approx(value)
    assert searched[0].question != searched[1].question


def test_a_spec_of_the_winner(searched: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "spec.yaml"
    text = ask(*CHAT, "--emit-spec", str(file))
    assert f"afflux spec check {file}" in text
    spec = load_spec(file)
    assert (spec.attention.count, spec.ffn.count) == (16, 112)
    assert "P/D serves more here" in refused(*but(workload="coding"), "--emit-spec", str(file))


def test_no_level_that_holds_is_an_answer(searched: list[Any]) -> None:
    text = ask(*but(gpus="16"))
    assert "No level holds TTFT 50 ms and TPOT 15 ms on 16 GPUs" in text
    assert "Best of each level" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (but(model="deepseek-v3.3"), "unknown model 'deepseek-v3.3'.*did you mean deepseek-"),
        (but(system="h20_sxm"), "unknown system 'h20_sxm'.*h200_sxm"),
        (but(gpus="0"), "--gpus 0: expected 1 or more"),
        (but(gpus="-8"), "--gpus -8: expected 1 or more"),
        (but(gpus="100"), "100 do not divide into whole nodes; take 96 or 104"),
        (but(workload="chatt"), "expected chat, coding, agentic.*did you mean chat"),
        (but(workload="100:200"), "expected chat, coding, agentic, or PREFIX:PROMPT:OUTPUT"),
        (but(workload="-1:2:3"), "prefix is -1, expected 0 or more"),
        (but(workload="1:0:3"), "prompt is 0, expected 1 or more"),
        (but(ttft="fast"), "--ttft fast: expected a time, as in 50ms or 0.05s"),
        (but(ttft="-50ms"), "--ttft -50ms: expected a time above 0"),
        (but(tpot="0"), "--tpot 0: expected a time above 0"),
        (but(tpot="0.015"), "--tpot 0.015: .* milliseconds; write 0.015s or 0.015ms"),
        (but(network="cluter=50"), "no tier 'cluter'.*nvlink, cluster; did you mean cluster"),
        (but(network="cluster=-5"), "expected GB/s per GPU and direction above 0"),
        (but(network="cluster"), "expected GB/s per GPU and direction above 0"),
        (but(network="cluster=50,10"), "expected a latency with a unit, as in 10us"),
        (but(modes="afd,afdd"), "no level 'afdd'.*did you mean afd"),
        (
            but(kernels="rofline"),
            "expected one of aic, roofline, or a file.*; did you mean roofline",
        ),
        (but(backend="vlm"), "expected one of trtllm, vllm, sglang; did you mean vllm"),
        (but(kernels="nowhere.json"), "nowhere.json"),
        (but(precision="fp16"), "--precision fp16: expected fp8 or bf16"),
        (but(prefill_rate="1.2"), "--prefill-rate 1.2: expected a share above 0, at most 1"),
        (but(decode_rate="-1"), "--decode-rate -1: expected a share"),
        (but(memory_share="0"), "--memory-share 0: expected a share"),
        (but(pd_ttft="0.5"), "--pd-ttft 0.5: expected a factor, 1 or more"),
        (but(wire_bytes="-2"), "--wire-bytes -2: expected bytes per element"),
        (but(compare="sistem=h200_sxm"), "expected KEY=VALUE.*did you mean system"),
        (but(compare="system"), "expected KEY=VALUE"),
        (but(compare="gpus=many"), "expected a whole number of GPUs"),
        (but(compare="system=h20_sxm"), "unknown system 'h20_sxm'"),
        (but(reproduce="2605.00001"), "2605.00001.*expected 2605.28302"),
        (CHAT[2:], "missing; as in --model deepseek-ai/DeepSeek-V3.2"),
        (["--model", "deepseek-v3.2"], "missing; as in --system b200_sxm"),
    ],
)
def test_mistakes_are_named_before_anything_is_searched(
    searched: list[Any], words: list[str], said: str
) -> None:
    import re

    text = refused(*words)
    assert re.search(said, text), text
    assert searched == []


def test_lengths_without_targets_ask_for_them(searched: list[Any]) -> None:
    words = but(workload="1:2:3")
    del words[words.index("--ttft") : words.index("--kernels")]
    assert "has no targets of its own; give --ttft and --tpot" in refused(*words)


def test_a_config_without_experts_is_refused(searched: list[Any], tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "vocab_size": 100,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "experts" in refused(*but(model=str(tmp_path)))


def test_a_missing_extra_says_what_to_install(
    searched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("aiconfigurator_core")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    aic._opened.cache_clear()
    assert "pip install 'afflux[plan]'" in refused(*but(kernels="aic"))


def test_a_real_search_goes_on_where_it_was(tmp_path: Path) -> None:
    kept, file, spec = (tmp_path / name for name in ("kept.jsonl", "plan.json", "spec.yaml"))
    words = [
        *("--model", "Qwen/Qwen3-30B-A3B", "--system", "h200_sxm", "--gpus", "2"),
        *("--workload", "0:64:64", "--ttft", "1s", "--tpot", "50ms", "--kernels", "roofline"),
        *("--modes", "aggregated,afd", "--jobs", "1", "--resume", str(kept), "--json", str(file)),
    ]
    ask(*words)
    first = json.loads(file.read_text())
    assert kept.stat().st_size > 0
    ask(*words)
    again = json.loads(file.read_text())
    answers = [report["details"]["answers"][0] for report in (first, again)]
    assert answers[0]["best"] == answers[1]["best"]
    assert first["summary"]["aggregated_tokens_per_s"] > 0
    ask(*words, "--modes", "afd", "--emit-spec", str(spec))
    emitted = load_spec(spec)
    assert (emitted.attention.count, emitted.ffn.count) == (1, 1)
    assert "No level holds TTFT 1 s and TPOT 0.01 ms" in ask(*words, "--tpot", "10us")


def test_lists(tmp_path: Path) -> None:
    text = ask("--list-models", "--list-systems")
    for words in ("deepseek-ai/DeepSeek-V3.2", "b200_sxm", "gb200", "nvlink 900"):
        assert words in text


@given(
    number=st.floats(1.0, 1e5).map(lambda value: round(value, 3)),
    unit=st.sampled_from([("", 1e-3), ("ms", 1e-3), ("s", 1.0), ("us", 1e-6)]),
)
def test_times_are_read_in_their_unit(number: float, unit: tuple[str, float]) -> None:
    assert duration(f"{number}{unit[0]}", "--ttft") == pytest.approx(number * unit[1])


@given(st.text(max_size=8))
def test_any_text_is_a_time_or_a_refusal(text: str) -> None:
    try:
        found = duration(text, "--ttft")
    except PlannerError as error:
        said = str(error)
    else:
        said = f"--ttft {found}"
        assert found > 0
    assert said.startswith("--ttft")


def test_other_inputs_are_shown_and_count(searched: list[Any], monkeypatch: Any) -> None:
    moved = [
        Moved("network", 0.8, Mode.AFD, 3500.0, 3500 / 3970 - 1, False),
        Moved("expert kernels", 1.2, Mode.PD_AFD, 3000.0, 3000 / 3970 - 1, True),
        Moved("fan-out of the paper", float("nan"), None, 0.0, float("nan"), True),
    ]
    monkeypatch.setattr(plan, "_sensitivity", lambda *given: moved)
    text = ask(*CHAT, "--sensitivity")
    assert "If an input is another" in text
    assert "another level wins with expert kernels x1.2 and fan-out of the paper" in text
    assert "Confidence: low" in text
