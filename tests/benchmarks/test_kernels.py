"""What the kernel benchmark measures where, and what it makes of steps with and without a hop."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from afflux.main import app
from benchmarks import kernels
from benchmarks.kernel_engines import _turns
from benchmarks.models import BALANCED
from planner.explore.kernels.measured import MeasuredDB

TINY = BALANCED | {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}


def test_a_hop_is_what_steps_take_longer():
    # 10 layers, 2 ms of attention at n and 50 us of work, 30 us of wire and FFN per message
    worked, elsewhere, layers = 50e-6, 30e-6, 10
    timed = {
        0: 2e-3,
        1: 2e-3 + layers * (worked + elsewhere),
        2: 2 * (2e-3 + layers * worked),
    }
    row = kernels.hop_row(8, timed, layers, 12e-6)
    assert row["tokens"] == 8
    assert row["attention_s"] == pytest.approx(worked)
    assert row["ffn_s"] == pytest.approx(12e-6)
    assert row["wire_s"] == pytest.approx(elsewhere - 12e-6)
    # where two lanes weren't timed: the same share of the whole
    del timed[2]
    larger = kernels.hop_row(16, timed, layers, 12e-6, row)
    assert larger["attention_s"] == pytest.approx(worked)


@pytest.mark.parametrize(
    "timed",
    [{0: 3e-3, 1: 2e-3, 2: 9e-3}, {0: 2e-3, 1: 3e-3, 2: 1e-3}, {0: 2e-3, 1: 2e-3, 2: 4e-3}],
)
def test_noise_makes_no_negative_times(timed: dict[int, float]):
    row = kernels.hop_row(8, timed, 10, 5e-6)
    whole = max(0.0, timed[1] - timed[0]) / 10
    parts = [row["attention_s"], row["wire_s"], row["ffn_s"]]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == pytest.approx(whole)


def test_settings_fit_the_cache():
    tokens = kernels.room(BALANCED, "float32")
    assert tokens == (2 << 30) // (2 * 4 * 64 * 24 * 4)
    assert kernels.room(BALANCED, "bfloat16") == (2 << 30) // (2 * 4 * 64 * 24 * 2)
    found = kernels.fitting((8, 64, 256), (64, 1152), tokens)
    # blocks of 128 tokens: 256 x 128 and 8 x 1280 fit 43,690 tokens, 64 x 1280 don't
    assert found == [(8, 64), (8, 1152), (64, 64), (256, 64)]
    assert kernels.fitting((1,), (64,), 128) == []  # vLLM keeps a block for itself


def test_every_setting_has_its_turn():
    assert list(_turns("ab", 0.0)) == ["a", "b"]
    many = []
    for setting in _turns("ab", 0.05):
        many.append(setting)
    assert len(many) > 2 and many[:4] == ["a", "b", "a", "b"]


def test_models_by_name():
    assert list(kernels.chosen_models(["ffn_heavy"])) == ["ffn_heavy"]
    assert kernels.chosen_models([]) == dict(kernels.MODELS)
    done = CliRunner().invoke(app, ["bench", "kernels", "--model", "no_such"])
    assert done.exit_code != 0 and "no_such" in done.output and "balanced" in done.output


def test_help():
    done = CliRunner().invoke(app, ["bench", "kernels", "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for word in ("--compiled", "--seconds", "--model", "planner_two_cores"):
        assert word in done.output


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_tiny_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MODELS", {"tiny": TINY})
    path = tmp_path / "kernels.json"
    report = kernels.run(path, effort=kernels.Effort((4, 8, 16), (64, 320), 1.0))
    entry = json.loads(path.read_text())["details"]["models"]["tiny"]
    assert {row["threads"] for row in entry["attention"]} == {1, 2}
    assert {row["held"] for row in entry["experts"]} == {2, 4}
    assert all(row["layers_s"] > 0 and row["outside_s"] > 0 for row in entry["attention"])
    assert all(row["seconds"] > 0 for row in entry["experts"])
    assert all(row["ffn_s"] >= 0 and row["attention_s"] >= 0 for row in entry["hop"])
    assert MeasuredDB(path).models["tiny"].experts == 4
    assert report["summary"]["models"] == "tiny"
