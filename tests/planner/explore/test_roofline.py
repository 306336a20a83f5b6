"""The roofline against hand arithmetic, and what has to hold whatever the rates."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore.kernels.base import KernelDB, Load, Provenance, Side, Sides
from planner.explore.kernels.collectives import all_reduce, all_to_all
from planner.explore.kernels.roofline import RooflineDB, seen
from planner.explore.kernels.unit import Unit
from planner.explore.model import Model, model_from_config, read_model
from planner.explore.system import Gpu, System, Tier, find_system
from tests.planner.explore.test_model import TINY

# 1 TFLOP/s and 1 TB/s, reached in full
PLAIN = Gpu("plain", 1e11, 1e12, {"bf16": 1e12, "fp8": 4e12}, "made up", 1.0, 1.0, launch=0.0)
TIERS = (Tier("nvlink", 8, 1e-5, 400e9), Tier("cluster", None, 3e-5, 50e9))
PLAIN_DB = RooflineDB(System("plain", PLAIN, 8, TIERS))
# arithmetic for nothing: memory binds
FREE_DB = RooflineDB(System("free", replace(PLAIN, flops={"bf16": 1e18}), 8, TIERS))
DB: KernelDB = RooflineDB(find_system("h200_sxm"))
NAMES = ("deepseek-v3", "deepseek-v3.2", "qwen3-30b", "gpt-oss-20b", "mixtral-8x7b")
FFN_HAS_ALL = Sides(router=Side.FFN, shared=Side.FFN)


def load(decode: float = 0, context: float = 0, prefill: float = 0, past: float = 0) -> Load:
    return Load(*(np.array([value], float) for value in (decode, context, prefill, past)))


def attention(model: Model, work: Load, tp: int = 1, sides: Sides | None = None) -> float:
    return float(DB.attention(model, tp, sides or Sides(), work).seconds[0])


def experts(model: Model, tp: int, ep: int, tokens: float) -> float:
    return float(DB.experts(model, tp, ep, Sides(), np.array([tokens])).seconds[0])


def test_a_gemm_bound_by_arithmetic_and_one_by_memory() -> None:
    unit = Unit(PLAIN)
    many = unit.gemm(np.array([4096.0]), 2048, 1024, "bf16", 2.0)
    assert many[0] == pytest.approx(2 * 4096 * 2048 * 1024 / 1e12)
    one = unit.gemm(np.array([1.0]), 2048, 1024, "bf16", 2.0)
    assert one[0] == pytest.approx((2048 * 1024 + 1024 + 2048) * 2 / 1e12)
    narrow = unit.gemm(np.array([4096.0]), 2048, 1024, "fp8", 1.0)
    assert narrow[0] == pytest.approx(many[0] / 4)
    assert unit.gemm(np.array([0.0]), 2048, 1024, "bf16", 2.0)[0] == 0


def test_derates_and_the_launch_floor() -> None:
    unit = Unit(replace(PLAIN, bandwidth_share=0.8, flops_share=0.5, launch=3e-6))
    assert unit.kernel(0.0, 8e9) == pytest.approx(0.01)
    assert unit.kernel(1e10, 0.0) == pytest.approx(0.02)
    assert unit.kernel(1.0, 1.0) == 3e-6
    assert unit.kernel(0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("form", "flops", "arithmetic"),
    [
        ("fp8", {"bf16": 1}, "bf16"),
        ("mxfp4", {"bf16": 1, "fp8": 2}, "bf16"),
        ("mxfp4", {"bf16": 1, "fp8": 2, "fp4": 4}, "fp8"),
        ("nvfp4", {"bf16": 1, "fp8": 2, "fp4": 4}, "fp4"),
        ("nvfp4", {"bf16": 1, "fp8": 2}, "bf16"),
    ],
)
def test_what_a_gpu_computes_in(form: str, flops: dict[str, float], arithmetic: str) -> None:
    assert Unit(replace(PLAIN, flops=flops)).arithmetic(form) == arithmetic


def test_one_decode_step_by_hand() -> None:
    """Where memory binds: all weights once, KV once, states in and out."""
    model = model_from_config("tiny", TINY)
    batch, context = 2.0, 500.0
    qkv, out = 64 * 16 * (4 + 2 + 2), 4 * 16 * 64
    weights = 6 * (qkv + out + 64 * 8) + 64 * 1000
    kv = 6 * batch * context * 2 * 2 * 16
    states = 6 * (2 * 4 * 64 + (64 + 128) + (64 + 64) + (64 + 8) + 8) + 64 + 1000 + 2 * 64
    expected = 2 * (weights + kv + batch * states) / 1e12
    got = FREE_DB.attention(model, 1, Sides(), load(batch, context))
    assert got.seconds[0] == pytest.approx(expected)
    assert set(got.parts) == {Provenance.ROOFLINE}
    assert got.shares() == {Provenance.ROOFLINE: 1.0}


def test_one_expert_step_by_hand() -> None:
    model = model_from_config("tiny", TINY)
    tokens = 3.0
    touched, pairs = 8 * (1 - 0.75**3), 3 * 2
    values = touched * 3 * 64 * 96 + pairs * ((64 + 2 * 96) + 3 * 96 + (96 + 64))
    got = FREE_DB.experts(model, 1, 1, Sides(), np.array([tokens])).seconds[0]
    assert got == pytest.approx(6 * 2 * values / 1e12)
    # so many that arithmetic binds: three matrices, two choices; the activation still by memory
    tokens = 1e6
    flops = 2 * tokens * 2 * 3 * 64 * 96
    got = PLAIN_DB.experts(model, 1, 1, Sides(), np.array([tokens])).seconds[0]
    assert got == pytest.approx(6 * (flops / 1e12 + 2 * tokens * 2 * 3 * 96 / 1e12))


def test_a_lone_token_still_keeps_one_expert_of_the_busiest_rank_busy() -> None:
    model = read_model("deepseek-v3")
    one = 58 * 3 * 7168 * 2048 * model.expert_bytes / 1e12
    got = PLAIN_DB.experts(model, 1, 256, Sides(), np.array([1.0])).seconds[0]
    assert got == pytest.approx(one, rel=0.01)


@pytest.mark.parametrize("cap", [7.0, 40.0, 1000.0, np.inf])
def test_tokens_seen_are_the_mean_over_the_chunk(cap: float) -> None:
    past, chunk = np.array([0.0, 20.0, 100.0]), np.array([50.0, 64.0, 1.0])
    for i in range(3):
        steps = past[i] + (np.arange(10_000) + 0.5) / 10_000 * chunk[i]
        assert seen(past, chunk, cap)[i] == pytest.approx(np.minimum(steps, cap).mean(), rel=1e-3)
    assert seen(past, np.zeros(3), cap).tolist() == [0, 0, 0]


def test_collectives_by_hand() -> None:
    system, size = PLAIN_DB.system, 8e6
    assert all_reduce(system, 1, size) == 0
    assert all_reduce(system, 4, size) == pytest.approx(1e-5 + 1.5 * size / 400e9)
    two_nodes = 1e-5 + 1.75 * size / 400e9 + 3e-5 + 1.0 * size / 8 / 50e9
    assert all_reduce(system, 16, size) == pytest.approx(two_nodes)
    assert all_to_all(system, 8, size) == pytest.approx(1e-5 + 7 / 8 * size / 400e9)
    assert all_to_all(system, 32, size) == pytest.approx(3e-5 + 24 / 32 * size / 50e9)
    assert all_to_all(system, 32, 0.0) == 0


def test_exchange_by_hand() -> None:
    model, db, tokens = read_model("qwen3-30b"), PLAIN_DB, np.array([32.0])
    state = 32 * 2048 * 2
    system = db.system
    assert db.exchange(model, 1, 1, 1, 1, tokens).seconds[0] == 0
    for moe_tp, ep in ((8, 1), (1, 8)):
        summed = db.exchange(model, 8, 1, moe_tp, ep, tokens).seconds[0]
        assert summed == pytest.approx(48 * float(all_reduce(system, 8, state)))
    gathered = db.exchange(model, 2, 4, 8, 1, tokens).seconds[0]
    assert gathered == pytest.approx(48 * float(all_reduce(system, 8, 4 * state)))
    # 8 choices of 128 with 8 groups of 16: distinct groups by counting the ways to miss one
    miss = np.prod([(112 - i) / (128 - i) for i in range(8)])
    sent = state * 8 * (1 - miss)
    spread = db.exchange(model, 1, 8, 1, 8, tokens).seconds[0]
    assert spread == pytest.approx(48 * 2 * float(all_to_all(system, 8, sent)))
    narrow = db.exchange(read_model("qwen3-30b", precision="fp8"), 1, 8, 1, 8, tokens).seconds[0]
    assert 0.5 * spread < narrow < spread


batches = st.floats(1, 512)
contexts = st.floats(1, 200_000)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    batch=batches,
    context=contexts,
    prefill=st.sampled_from([0.0, 1.0, 777.0, 4096.0]),
    past=st.floats(0, 100_000),
    more=st.floats(1, 4),
)
def test_more_work_never_takes_less(
    name: str, batch: float, context: float, prefill: float, past: float, more: float
) -> None:
    model = read_model(name)
    base = attention(model, load(batch, context, prefill, past))
    close = base * (1 - 1e-9)
    assert attention(model, load(batch * more, context, prefill, past)) >= close
    assert attention(model, load(batch, context * more, prefill, past)) >= close
    assert attention(model, load(batch, context, prefill * more, past)) >= close
    assert attention(model, load(batch, context, prefill, past * more)) >= close
    wide = experts(model, 1, 2, batch)
    assert experts(model, 1, 2, batch * more) >= wide * (1 - 1e-9)
    assert DB.exchange(model, 1, 2, 1, 2, np.array([batch, batch * more])).seconds[1] > 0


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    tokens=st.floats(1, 1e5),
    ep=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2]),
)
def test_experts_take_less_over_more_gpus(name: str, tokens: float, ep: int, tp: int) -> None:
    model = read_model(name)
    assert experts(model, tp, 2 * ep, tokens) <= experts(model, tp, ep, tokens)
    assert experts(model, 2 * tp, ep, tokens) <= experts(model, tp, ep, tokens)
    assert experts(model, 1, 8, 1e5) < 0.2 * experts(model, 1, 1, 1e5)


@pytest.mark.parametrize("name", NAMES)
def test_a_prefix_costs_attention_but_no_products(name: str) -> None:
    """Only scores see the prefix: its cost is the same whatever the model's projections are."""
    model = read_model(name)
    thin = replace(model, shared_inter=0, dense_inter=64, vocab=1000)
    extra = [
        attention(m, load(prefill=2048, past=60_000)) - attention(m, load(prefill=2048))
        for m in (model, thin)
    ]
    assert extra[0] > 0
    assert extra[0] == pytest.approx(extra[1], rel=1e-6)
    # and grows with the prompt's tokens times the prefix
    if model.attention.kind == "gqa" and not model.attention.windowed:
        a = model.attention
        flops = model.layers * 2048 * 60_000 * 4 * a.heads * a.head_dim
        assert extra[0] == pytest.approx(flops / (989e12 * 0.7), rel=0.01)


def test_windows_and_indexers_spare_long_contexts() -> None:
    short, long = load(64, 4096), load(64, 131_072)
    gpt = read_model("gpt-oss-20b")
    everywhere = replace(gpt, attention=replace(gpt.attention, window=0, windowed=0))
    assert attention(gpt, long) < 0.6 * attention(everywhere, long)
    dense, sparse = read_model("deepseek-v3"), read_model("deepseek-v3.2")
    assert attention(sparse, long) < 0.5 * attention(dense, long)
    assert attention(sparse, short) > 0.8 * attention(dense, short)


def test_moving_parts_moves_their_time() -> None:
    model, work = read_model("deepseek-v3"), load(64, 4096)
    tokens = np.array([64.0])
    at_a = attention(model, work) - attention(model, work, sides=FFN_HAS_ALL)
    at_f = DB.experts(model, 1, 1, FFN_HAS_ALL, tokens).seconds[0] - experts(model, 1, 1, 64)
    assert at_a == pytest.approx(at_f)
    assert at_a > 0


def test_arrays_broadcast_and_match_single_questions() -> None:
    model = read_model("deepseek-v3.2")
    batch, context = np.array([1.0, 8.0, 64.0]), np.array([[1000.0], [50_000.0]])
    grid = DB.attention(model, 1, Sides(), Load(batch, context)).seconds
    assert grid.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            alone = attention(model, load(batch[j], context[i, 0]))
            assert grid[i, j] == pytest.approx(alone)


def test_nothing_to_do_takes_nothing() -> None:
    for name in NAMES:
        model = read_model(name)
        assert attention(model, load()) == 0
        assert experts(model, 1, 2, 0.0) == 0
        assert DB.exchange(model, 1, 2, 1, 2, np.zeros(1)).seconds[0] == 0


def test_refuses() -> None:
    model = read_model("deepseek-v3")
    with pytest.raises(PlannerError, match="divides the 128 heads"):
        DB.attention(model, 3, Sides(), load(1, 1))
    with pytest.raises(PlannerError, match="512 expert groups"):
        DB.experts(model, 1, 512, Sides(), np.ones(1))
    with pytest.raises(PlannerError, match="expected as many"):
        DB.exchange(model, 1, 4, 1, 8, np.ones(1))
