"""Measured kernels against the package's own engine, which knows nothing of sides or tables."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.explore.kernels.base import Load, NotCovered, Provenance, Side, Sides, Time
from planner.explore.model import Model, model_from_config, read_model
from planner.explore.system import find_system

pytest.importorskip(
    "aiconfigurator_core", reason="measured kernels come with the extra: pip install 'afflux[plan]'"
)

from planner.explore.kernels.aic import AicDB

H200, SIDES = find_system("h200"), Sides()
BATCHES = np.array([1.0, 3, 16, 50, 128])


@pytest.fixture(scope="module")
def db() -> AicDB:
    return AicDB(H200)


@pytest.fixture(scope="module")
def loose() -> AicDB:
    return AicDB(H200, allow_extrapolation=True, all_moe=True, beyond="package")


@pytest.fixture(scope="module")
def qwen() -> Model:
    return read_model("qwen3-30b-a3b")


@pytest.fixture(scope="module")
def deepseek() -> Model:
    return read_model("deepseek-v3")


def decode(batch: np.ndarray, context: float) -> Load:
    return Load(batch, np.full_like(batch, context))


def prompt(tokens: np.ndarray, past: float = 0.0, prompts: float = 1.0) -> Load:
    none = np.zeros_like(tokens)
    return Load(none, none, tokens, none + past, none + prompts)


def engine(model: str, tp: int, dp: int, moe_tp: int, ep: int):
    from aiconfigurator_core.sdk.engine import EngineHandle

    return EngineHandle.compile(
        model,
        "h200_sxm",
        "trtllm",
        tp_size=tp,
        attention_dp_size=dp,
        moe_tp_size=moe_tp,
        moe_ep_size=ep,
    )


def whole(db: AicDB, model: Model, split: tuple[int, int, int, int], load: Load) -> np.ndarray:
    """Seconds of a step of a replica."""
    tp, dp, moe_tp, ep = split
    time = db.attention(model, tp, SIDES, load)
    time += db.experts(model, moe_tp, ep, SIDES, dp * load.tokens)
    return (time + db.exchange(model, *split, load.tokens)).seconds


# -- the same as the package says ------------------------------------------------------------------


@pytest.mark.parametrize("split", [(1, 1, 1, 1), (1, 8, 1, 8), (4, 1, 4, 1), (2, 4, 2, 4)])
def test_decode_steps_are_those_of_the_package(
    loose: AicDB, qwen: Model, split: tuple[int, int, int, int]
) -> None:
    theirs = engine("Qwen/Qwen3-30B-A3B", *split)
    batches = np.array([1.0, 5, 23, 64, 200, 500])
    ours = whole(loose, qwen, split, decode(batches, 2500.0))
    expected = [1e-3 * theirs.decode_step_latency(int(b), 2000, 1000) for b in batches]
    # ours also has the all-reduce behind each layer's attention where the package's exchange has it
    assert ours == pytest.approx(expected, rel=0.02)


def test_replicas_run_the_kernels_that_go_with_their_library(loose: AicDB, deepseek: Model) -> None:
    import aiconfigurator_core
    from aiconfigurator_core.sdk import config, models, perf_database
    from aiconfigurator_core.sdk.engine import EngineHandle, build_engine_spec_json

    data = perf_database.get_database("h200_sxm", "trtllm", "current")
    asked = config.ModelConfig(
        tp_size=1,
        attention_dp_size=8,
        moe_tp_size=1,
        moe_ep_size=8,
        moe_comm_backend={"context": "trtllm_deepep_ht", "generation": "trtllm_deepep_ll"},
        num_gpus_per_node=8,
        system="h200_sxm",
    )
    name = "deepseek-ai/DeepSeek-V3"
    models.resolve_context_fmha_by_data(asked, name, data, "trtllm", is_context_role=True)
    spec = build_engine_spec_json(
        models.get_model(name, asked, "trtllm"),
        model_path=name,
        system="h200_sxm",
        backend="trtllm",
        backend_version=data.version,
        kv_block_size=None,
        systems_path=None,
        nextn=0,
        database=data,
    )
    theirs = EngineHandle(aiconfigurator_core.engine_spec_bincode_from_json(spec))
    split, batches = (1, 8, 1, 8), np.array([1.0, 20, 100, 250])
    ours = whole(loose.replica(deepseek, *split), deepseek, split, decode(batches, 2500.0))
    expected = [1e-3 * theirs.decode_step_latency(int(b), 2000, 1000) for b in batches]
    assert ours == pytest.approx(expected, rel=0.02)
    # on GPUs of their own the sides can't hide shared experts
    assert np.all(whole(loose, deepseek, split, decode(batches, 2500.0))[1:] > ours[1:])


@pytest.mark.parametrize("split", [(1, 8, 1, 8), (4, 1, 4, 1)])
def test_prefill_steps_are_those_of_the_package(
    loose: AicDB, qwen: Model, split: tuple[int, int, int, int]
) -> None:
    theirs = engine("Qwen/Qwen3-30B-A3B", *split)
    for tokens, past in ((500, 0), (1800, 0), (777, 1234)):
        ours = whole(loose, qwen, split, prompt(np.array([float(tokens)]), past))
        expected = 1e-3 * theirs.predict_prefill_latency(1, tokens + past, past)
        # ours samples a token of each prompt
        assert ours[0] == pytest.approx(expected, rel=0.02)


def test_mixed_steps_are_those_of_the_package(loose: AicDB, qwen: Model) -> None:
    theirs = engine("Qwen/Qwen3-30B-A3B", 1, 4, 1, 4)
    one = np.ones(1)
    for requests, prompts in ((30, 1), (100, 2)):
        chunk = 2000 * prompts
        load = Load(requests * one, 2500.0 * one, chunk * one, 0.0 * one, prompts * one)
        ours = whole(loose, qwen, (1, 4, 1, 4), load)
        expected = 1e-3 * theirs.mixed_step_latency(chunk, requests, 2000, 1000)
        # the package forgets the output head in steps that carry prompts
        head = loose.attention(qwen, 1, SIDES, Load(requests * one, 2500.0 * one)).parts
        assert ours[0] - head[Provenance.EXTRAPOLATED][0] == pytest.approx(expected, rel=0.02)


def test_pieces_of_prompts_cost_what_their_kernels_do(loose: AicDB, qwen: Model) -> None:
    theirs = engine("Qwen/Qwen3-30B-A3B", 1, 4, 1, 4)
    one = np.ones(1)
    load = Load(30 * one, 2500.0 * one, 1000 * one, 500 * one, one)
    ours = whole(loose, qwen, (1, 4, 1, 4), load)[0]
    # the package takes half of a whole prompt's attention for half a prompt, whatever was cached
    expected = 1e-3 * theirs.mixed_step_latency(1000, 30, 2000, 1000)
    assert 1.02 < ours / expected < 1.10


def test_tables_between_their_points_are_what_the_engine_says(db: AicDB, deepseek: Model) -> None:
    rank = db._rank(deepseek, 8)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 8000, 60)
    for work in (*rank.both, *rank.shared, *rank.output):
        got = work.seconds(tokens.astype(float))
        asked = [work.seconds._function(int(t)) for t in tokens]
        assert got == pytest.approx(asked, rel=0.02)
    batch = rng.integers(1, 500, 30)
    got = db.attention(deepseek, 8, SIDES, decode(batch.astype(float), 3000.0)).seconds
    at = [rank.first + i for i in range(len(rank.generation))]
    small = sum(one.seconds(batch.astype(float)) for one in (*rank.both, *rank.output))
    small = small + sum(one.seconds(batch.astype(float)) for one in (*rank.shared, *rank.router))
    direct = [rank.engine.total_generation(at, int(b), 3001) for b in batch]
    assert got == pytest.approx(small + direct, rel=0.02)


# -- sides -----------------------------------------------------------------------------------------


def test_shared_experts_and_routers_move(db: AicDB, deepseek: Model) -> None:
    tokens = np.array([256.0])
    here, there = Sides(), Sides(Side.FFN, Side.FFN)
    load = decode(tokens, 2000.0)
    moved = (
        db.attention(deepseek, 1, here, load).seconds
        - db.attention(deepseek, 1, there, load).seconds
    )
    gained = (
        db.experts(deepseek, 1, 1, there, tokens).seconds
        - db.experts(deepseek, 1, 1, here, tokens).seconds
    )
    assert moved[0] > 0
    assert gained == pytest.approx(moved, rel=1e-6)
    spread = (
        db.experts(deepseek, 1, 64, there, tokens).seconds
        - db.experts(deepseek, 1, 64, here, tokens).seconds
    )
    assert 0 < spread[0] < gained[0]


def test_dense_layers_have_no_experts(db: AicDB, loose: AicDB, deepseek: Model) -> None:
    tokens = np.array([512.0])
    ours = db.experts(deepseek, 1, 8, SIDES, tokens).seconds
    theirs = loose.experts(deepseek, 1, 8, SIDES, tokens).seconds
    assert ours == pytest.approx(theirs * 58 / 61, rel=1e-6)


def test_groups_that_were_not_measured_lie_between(db: AicDB, deepseek: Model) -> None:
    tokens = np.array([512.0, 2048.0])

    def at(ep: int) -> np.ndarray:
        return db.experts(deepseek, 1, ep, SIDES, tokens).seconds

    # 256 experts in 112 or 126 groups: the fullest has three, as of 85.3 groups
    assert np.all((at(128) <= at(112)) & (at(112) <= at(64)))
    assert at(126) == pytest.approx(at(112))
    assert at(128)[0] < at(112)[0] < at(64)[0]
    time = db.experts(deepseek, 1, 112, SIDES, tokens)
    assert time.shares() == {Provenance.INTERPOLATED: 1.0}


def test_gpus_that_divide_tokens_have_at_least_one(deepseek: Model) -> None:
    split = (8, 1, 1, 8)
    replica = AicDB(H200, "sglang").replica(deepseek, *split)
    one, many = np.array([1.0]), np.array([1000.0])
    assert replica.attention(deepseek, 8, SIDES, prompt(many)).seconds[0] > 0
    few = replica.exchange(deepseek, *split, one).seconds[0]
    assert 0 < few < replica.exchange(deepseek, *split, many).seconds[0]


def test_even_loads_are_faster(deepseek: Model, db: AicDB) -> None:
    tokens = np.array([1024.0])
    even = AicDB(H200, balanced=True).experts(deepseek, 1, 8, SIDES, tokens).seconds
    assert even[0] < db.experts(deepseek, 1, 8, SIDES, tokens).seconds[0]


def test_a_single_gpu_exchanges_nothing(db: AicDB, qwen: Model) -> None:
    assert db.exchange(qwen, 1, 1, 1, 1, BATCHES).seconds == pytest.approx(np.zeros(5))


def test_the_all_reduce_of_attention_is_counted_once(loose: AicDB, qwen: Model) -> None:
    theirs = engine("Qwen/Qwen3-30B-A3B", 4, 1, 4, 1)
    both = [v for n, v, _, _ in theirs.decode_step_per_op(64, 2000, 1000) if "dispatch" in n]
    exchange = loose.exchange(qwen, 4, 1, 4, 1, np.array([64.0])).seconds[0]
    # the package's exchange is two all-reduces, of which the first is attention's
    assert exchange == pytest.approx(1e-3 * sum(both) / 2, rel=0.02)


# -- provenance ------------------------------------------------------------------------------------


def test_points_of_the_table_are_measured(db: AicDB, qwen: Model) -> None:
    time = db.experts(qwen, 1, 8, SIDES, np.array([128.0]))
    assert time.shares() == {Provenance.MEASURED: 1.0}
    time = db.experts(qwen, 1, 8, SIDES, np.array([100.0]))
    assert time.shares() == {Provenance.INTERPOLATED: 1.0}


def test_parts_add_up(db: AicDB, deepseek: Model) -> None:
    time = db.attention(deepseek, 1, SIDES, decode(BATCHES, 2000.0))
    assert isinstance(time, Time)
    assert sum(time.shares().values()) == pytest.approx(1.0)
    assert sum(time.parts.values()) == pytest.approx(time.seconds)
    # norms and embedding are formulas, the output head is wider than any measured matrix
    assert 0 < time.shares()[Provenance.ROOFLINE] < 0.2
    assert 0 < time.shares()[Provenance.EXTRAPOLATED] < 0.1


def test_outside_is_refused_and_says_what_could_be_answered(db: AicDB, qwen: Model) -> None:
    tokens = np.array([64.0, 16_384.0, 40_000.0])
    with pytest.raises(NotCovered, match="--allow-extrapolation") as caught:
        db.experts(qwen, 1, 8, SIDES, tokens)
    assert caught.value.covered is not None
    assert caught.value.covered.tolist() == [True, True, False]
    assert db.experts(qwen, 1, 8, SIDES, tokens[caught.value.covered]).seconds.shape == (2,)


def test_long_contexts_are_outside(db: AicDB, deepseek: Model) -> None:
    with pytest.raises(NotCovered, match="attention in decode"):
        db.attention(deepseek, 8, SIDES, decode(np.array([1.0]), 524_288.0))
    with pytest.raises(NotCovered, match="attention of prompts"):
        db.attention(deepseek, 8, SIDES, prompt(np.array([256.0]), 524_288.0))


def test_outside_is_answered_when_asked_for(loose: AicDB, deepseek: Model) -> None:
    near = loose.attention(deepseek, 8, SIDES, decode(np.array([1.0]), 65_536.0))
    far = loose.attention(deepseek, 8, SIDES, decode(np.array([1.0]), 524_288.0))
    assert near.shares().get(Provenance.EXTRAPOLATED, 0.0) < 0.05
    assert far.shares()[Provenance.EXTRAPOLATED] > 0.3
    assert far.seconds[0] > near.seconds[0]


def test_between_nodes_the_network_is_modelled(db: AicDB, deepseek: Model) -> None:
    inside = db.exchange(deepseek, 1, 8, 1, 8, np.array([64.0]))
    across = db.exchange(deepseek, 1, 64, 1, 64, np.array([64.0]))
    assert Provenance.ROOFLINE not in inside.shares()
    assert across.shares() == {Provenance.ROOFLINE: 1.0}


def test_sparse_attention_of_prompts_is_taken_from_trtllm(deepseek: Model) -> None:
    model, system = read_model("deepseek-v3.2"), find_system("b200")
    load = prompt(np.array([1024.0]))
    assert AicDB(system).attention(model, 8, SIDES, load).seconds[0] > 0
    with pytest.raises(NotCovered, match="--backend trtllm"):
        AicDB(system, "vllm").attention(model, 8, SIDES, load)


# -- models and refusals ---------------------------------------------------------------------------


def test_a_model_of_ones_own(db: AicDB, qwen: Model) -> None:
    config = {**dict(qwen.config), "num_hidden_layers": 24}
    half = model_from_config("mine", config)
    load = decode(np.array([32.0]), 1000.0)
    one, two = (db.experts(m, 1, 8, SIDES, load.tokens).seconds for m in (half, qwen))
    assert one == pytest.approx(two / 2, rel=1e-6)
    assert db.attention(half, 1, SIDES, load).seconds[0] > 0


def test_other_number_formats_are_other_kernels(db: AicDB) -> None:
    # few tokens: weights are what takes time
    tokens = np.array([8.0])
    wide = read_model("qwen3-235b-a22b-fp8", precision="bf16")
    narrow = read_model("qwen3-235b-a22b-fp8")
    assert (
        db.experts(narrow, 1, 8, SIDES, tokens).seconds[0]
        < db.experts(wide, 1, 8, SIDES, tokens).seconds[0]
    )


def test_heads_that_do_not_divide_are_refused(db: AicDB, qwen: Model) -> None:
    with pytest.raises(PlannerError, match="32 heads"):
        db.attention(qwen, 3, SIDES, decode(BATCHES, 100.0))


def test_sides_that_do_not_match_are_refused(db: AicDB, qwen: Model) -> None:
    with pytest.raises(PlannerError, match="as many"):
        db.exchange(qwen, 2, 2, 1, 8, BATCHES)


def test_kernels_that_were_not_measured_are_refused(db: AicDB) -> None:
    odd = replace(read_model("mixtral-8x7b-v0.1"), kv_bytes=0.5)
    with pytest.raises(NotCovered, match="KV cache"):
        db.attention(odd, 1, SIDES, decode(BATCHES, 100.0))


def test_systems_without_tables_are_refused() -> None:
    with pytest.raises(PlannerError, match="roofline"):
        AicDB(replace(H200, name="mine", kernels=""))
    with pytest.raises(PlannerError, match="no kernels"):
        AicDB(replace(H200, kernels="h9000_sxm"))


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("aiconfigurator_core")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "aiconfigurator_core", None)
    # a version that no test has opened yet
    with pytest.raises(PlannerError, match=r"pip install 'afflux\[plan\]'"):
        AicDB(H200, version="other")
