"""Specs from plans: accepted as they are, saying what was planned, refused where AFD is not it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from afflux.plan_spec import choose, emit
from cluster.paths import project_root
from cluster.preflight import check_engine_args
from cluster.spec import ClusterSpec, load_spec, make_spec
from planner.errors import PlannerError
from planner.explore.kernels.base import Side, Sides
from planner.explore.points import Mode, Targets
from planner.explore.question import Options
from tests.planner.explore.explorations import (
    AFD_WINS,
    GIB,
    exploration,
    group,
    point,
    refusal,
)

NAME = "deepseek-ai/DeepSeek-V3.2"


def load(tmp_path: Path, text: str) -> ClusterSpec:
    file = tmp_path / "spec.yaml"
    file.write_text(text)
    spec = load_spec(file)
    check_engine_args(spec)
    return spec


def test_the_spec_is_what_was_planned(tmp_path: Path) -> None:
    text, notes = emit(exploration(AFD_WINS), NAME)
    spec = load(tmp_path, text)
    assert notes == []
    assert (spec.attention.count, spec.ffn.count) == (16, 112)
    assert spec.attention.resources.gpus == spec.ffn.resources.gpus == 1
    assert spec.lanes == 3
    assert spec.attention.engine == {
        "max_model_len": 4096 + 512 + 256,
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.9,
    }
    assert (spec.slo.ttft_s, spec.slo.tpot_s) == (0.05, 0.015)
    assert spec.model.path == "/models/DeepSeek-V3.2"
    assert spec.served_name == NAME
    assert spec.name == "deepseek-v3-2"
    # 90 of 162 GiB on each of 112: 63 hold the same
    assert (spec.ffn.min, spec.ffn.max) == (63, 127)
    assert (spec.attention.min, spec.attention.max) == (1, 65)
    assert "# STATUS: planned, not validated." in text
    assert "16A+112F, batch 64 per attention actor, 3 lanes" in text


def test_a_folder_goes_into_the_spec(tmp_path: Path) -> None:
    folder = project_root() / "deploy" / "models" / "verse"
    for path in (folder, folder / "config.json"):
        text, _ = emit(exploration(AFD_WINS), str(path))
        assert load(tmp_path, text).model.path == str(folder)


def test_chunks_of_prompts_have_room_in_a_step_and_a_frame(tmp_path: Path) -> None:
    best = point(Mode.AFD, 3970.0, chunk=4096)
    spec = load(tmp_path, emit(exploration({Mode.AFD: best}), NAME)[0])
    assert spec.attention.engine["max_num_batched_tokens"] == 4160
    assert spec.transport.max_frame_tokens == 2048  # 4160 tokens in 3 lanes, up to a power of two


def test_tensor_parallelism_is_passed_over_for_the_best_without() -> None:
    plain = point(Mode.AFD, 3000.0)
    missing = point(Mode.AFD, 3500.0, tpot=0.02)
    best = point(Mode.AFD, 3970.0, groups=(group("attention", 16, tp=2), group("ffn", 112)))
    found = exploration({Mode.AFD: best}, frontier={Mode.AFD: (missing, best, plain)})
    chosen, notes = choose(found)
    assert chosen is plain
    assert "needs tensor parallelism" in notes[0] and "3,000 instead of 3,970" in notes[0]
    with pytest.raises(PlannerError, match="with tensor parallelism only"):
        choose(replace(found, frontier={Mode.AFD: (missing, best)}))


def test_replicas_are_deployments_of_their_own(tmp_path: Path) -> None:
    groups = (group("attention", 8, 2), group("ffn", 56, 2))
    text, notes = emit(exploration({Mode.AFD: point(Mode.AFD, 3970.0, groups=groups)}), NAME)
    spec = load(tmp_path, text)
    assert (spec.attention.count, spec.ffn.count) == (8, 56)
    assert "one of 2 equal deployments" in notes[0]


def test_no_targets_are_the_specs_own(tmp_path: Path) -> None:
    found = exploration(AFD_WINS)
    question = replace(found.question, targets=Targets(math.inf, 0.015))
    spec = load(tmp_path, emit(replace(found, question=question), NAME)[0])
    assert (spec.slo.ttft_s, spec.slo.tpot_s) == (2.0, 0.015)


def test_what_is_no_afd_is_refused() -> None:
    aggregated = point(Mode.AGGREGATED, 9000.0)
    for best, words in (
        ({**AFD_WINS, Mode.AGGREGATED: aggregated}, "aggregation serves more here.*--modes afd"),
        ({Mode.AFD: refusal()}, "AFD does not hold the targets: ttft: 0.093"),
        ({Mode.AGGREGATED: aggregated}, "add afd to --modes"),
    ):
        with pytest.raises(PlannerError, match=words):
            emit(exploration(best), NAME)


def test_experts_of_all_beside_attention_only() -> None:
    moved = Options(sides=Sides(Side.FFN, Side.FFN))
    with pytest.raises(PlannerError, match="--router-on attention --shared-on attention"):
        emit(exploration(AFD_WINS, options=moved), NAME)


@given(
    attention=st.integers(1, 64),
    ffn=st.integers(1, 256),
    batch=st.integers(1, 4096),
    lanes=st.integers(1, 8),
    memory=st.floats(0.0, 162 * GIB),
)
def test_any_split_is_accepted(
    attention: int, ffn: int, batch: int, lanes: int, memory: float
) -> None:
    groups = (group("attention", attention), group("ffn", ffn, memory=memory))
    best = point(Mode.AFD, 100.0, groups=groups, batch=batch, lanes=lanes)
    text, _ = emit(exploration({Mode.AFD: best}), NAME)
    spec = make_spec(yaml.safe_load(text))
    assert (spec.attention.count, spec.ffn.count, spec.lanes) == (attention, ffn, lanes)
    assert spec.attention.max + spec.ffn.min <= attention + ffn
    assert spec.ffn.max <= 256
