"""What is believed before anything was measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autoscaler.priors import latencies_from_emulation, prior_of
from cluster.spec import ClusterSpec, make_spec
from planner.curves import Linear
from planner.errors import PlannerError
from planner.latency import Latencies


@dataclass
class Checkpoint:
    """What is asked of ``actors.checkpoint.Checkpoint``."""

    moe_layers: tuple[int, ...] = (0, 1, 2, 3)
    top_k: int = 2
    config: dict[str, Any] = field(
        default_factory=lambda: {"hidden_size": 256, "dtype": "bfloat16"}
    )


def spec(**more: Any) -> ClusterSpec:
    return make_spec({"model": {"path": "verse"}, **more})


EMULATE = {
    "attention": {"a_s": 1e-5, "b_s": 1e-3},
    "ffn": {"a_s": 3e-4, "b_s": 1.5e-3},
    "transfer": {"a_s": 1e-9, "b_s": 1e-4},
}


def test_emulated_times_of_a_layer_become_those_of_a_step() -> None:
    emulate = spec(emulate=EMULATE).emulate
    assert emulate is not None
    latencies = latencies_from_emulation(emulate, layers=4, top_k=2, hidden=256, item_bytes=4)
    # 16 requests of 150 tokens: what the actors would sleep for
    assert latencies.t_attention(2400, 16) == pytest.approx(4 * (1e-5 * 2400 + 1e-3))
    assert latencies.t_ffn(16) == pytest.approx(4 * (3e-4 * 16 * 2 + 1.5e-3))
    there = 16 * 256 * 4 + 16 * 2 * 8
    back = 16 * 256 * 4
    assert latencies.t_transfer(16) == pytest.approx(4 * (1e-9 * (there + back) + 2e-4))
    # a prompt is context of one step too
    assert latencies.t_prefill(100) == pytest.approx(4 * 1e-5 * 100)


@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("bfloat16", 2), ("auto", 2)])
def test_a_spec_with_emulated_devices_is_its_own_prior(dtype: str, item: int) -> None:
    given = make_spec({"model": {"path": "verse", "dtype": dtype}, "emulate": EMULATE})
    prior = prior_of(given, Checkpoint())  # type: ignore[arg-type]
    assert prior is not None and prior.emulated and given.emulate is not None
    assert prior.latencies == latencies_from_emulation(
        given.emulate, layers=4, top_k=2, hidden=256, item_bytes=item
    )


def test_a_file_of_latencies_is_a_prior(tmp_path: Path) -> None:
    latencies = Latencies(Linear(1.0, 2.0), Linear(3.0, 4.0), Linear(5.0, 6.0))
    path = tmp_path / "latency.json"
    path.write_text(latencies.to_json(), encoding="utf-8")
    prior = prior_of(spec(autoscaler={"latencies": str(path)}), Checkpoint())  # type: ignore[arg-type]
    assert prior is not None and prior.latencies == latencies and not prior.emulated


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(PlannerError, match=r"nowhere\.json"):
        prior_of(spec(autoscaler={"latencies": "nowhere.json"}), Checkpoint())  # type: ignore[arg-type]


def test_real_devices_say_nothing_beforehand() -> None:
    assert prior_of(spec(), Checkpoint()) is None  # type: ignore[arg-type]
