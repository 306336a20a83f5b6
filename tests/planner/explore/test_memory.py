"""Bytes per GPU by hand, and beside aiconfigurator-core's own accounting."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore import memory
from planner.explore.kernels.base import Side, Sides
from planner.explore.model import Model, model_from_config, read_model
from tests.planner.explore.test_model import TINY

FFN_HAS_ALL = Sides(router=Side.FFN, shared=Side.FFN)


def test_weights_by_hand() -> None:
    model = model_from_config("tiny", TINY | {"n_shared_experts": 1})
    attention, expert, router, head = 64 * 16 * 12, 3 * 64 * 96, 64 * 8, 64 * 1000
    at_a, at_f = memory.attention_weights, memory.expert_weights
    assert at_a(model, 1, Sides()) == 2 * (2 * head + 6 * (attention + expert + router))
    # two of four query heads, one of two key/value heads; the router is on both
    assert at_a(model, 2, Sides()) == 2 * (head + 6 * (attention / 2 + expert / 2 + router))
    # no fewer than one key/value head
    quarter = 64 * 16 * (1 + 1 + 1 + 1)
    assert at_a(model, 4, FFN_HAS_ALL) == 2 * (head / 2 + 6 * quarter)
    assert at_f(model, 1, 1, Sides()) == 2 * 6 * 8 * expert
    assert at_f(model, 2, 4, Sides()) == 2 * 6 * 2 * expert / 2
    assert at_f(model, 1, 3, Sides()) == 2 * 6 * 3 * expert  # the fullest of three groups
    assert at_f(model, 1, 4, FFN_HAS_ALL) == 2 * 6 * (2 * expert + expert + router)


@pytest.mark.parametrize("name", ["deepseek-v3.2", "qwen3-30b", "gpt-oss-20b", "kimi-k2"])
@pytest.mark.parametrize("sides", [Sides(), FFN_HAS_ALL])
def test_one_gpu_each_holds_every_parameter(name: str, sides: Sides) -> None:
    model = replace(read_model(name), weight_bytes=2.0, expert_bytes=2.0)
    both = memory.attention_weights(model, 1, sides) + memory.expert_weights(model, 1, 1, sides)
    assert both == pytest.approx(2 * model.parameters, rel=1e-12)


def test_kv_by_hand() -> None:
    gpt = read_model("gpt-oss-120b")
    per_layer = 2 * 8 * 64 * 2
    assert memory.kv_per_request(gpt, 1, 1000) == per_layer * 18 * (1000 + 128)
    assert memory.kv_per_request(gpt, 1, 100) == per_layer * 36 * 100
    assert memory.kv_per_request(gpt, 4, 1000) == per_layer / 4 * 18 * (1000 + 128)
    assert memory.kv_per_request(gpt, 16, 1000) == memory.kv_per_request(gpt, 8, 1000)
    v3, v32 = read_model("deepseek-v3"), read_model("deepseek-v3.2")
    for tp in (1, 8):
        assert memory.kv_per_request(v3, tp, 10) == 61 * 10 * 576
        assert memory.kv_per_request(v32, tp, 10) == 61 * 10 * (512 + 64 * 2 + 128 + 4)


@given(
    tokens=st.floats(1, 1e6),
    more=st.floats(1, 10),
    name=st.sampled_from(["gpt-oss-20b", "deepseek-v3.2", "qwen3-235b"]),
    tp=st.sampled_from([1, 2, 4]),
)
def test_more_context_never_takes_less(tokens: float, more: float, name: str, tp: int) -> None:
    model = read_model(name)
    assert memory.kv_per_request(model, tp, tokens * more) >= memory.kv_per_request(
        model, tp, tokens
    )
    assert memory.kv_per_request(model, 2 * tp, tokens) <= memory.kv_per_request(model, tp, tokens)


def test_footprints_add_up() -> None:
    model = read_model("deepseek-v3.2")
    side = memory.attention_side(model, tp=2, sides=Sides(), tokens=64, requests=64, longest=5000)
    assert side.total == side.weights + side.activations + side.kv + side.buffers
    assert side.kv == 64 * memory.kv_per_request(model, 2, 5000)
    ffn = memory.ffn_side(model, tp=1, ep=64, sides=Sides(), tokens=65536)
    assert ffn.kv == 0
    assert ffn.activations == 2 * 65536 * 8 / 64 * (2 * 7168 + 3 * 2048)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m: memory.attention_weights(m, 3, Sides()), "divides the 128 heads"),
        (lambda m: memory.expert_weights(m, 1, 257, Sides()), "1 to 256"),
        (lambda m: memory.expert_weights(m, 3, 1, Sides()), "2048"),
        (
            lambda m: memory.worker(m, tp=2, dp=2, moe_tp=1, ep=8, tokens=1, requests=1, longest=1),
            "2 x 2 GPUs and experts over 1 x 8",
        ),
    ],
)
def test_refuses(ask: Callable[[Model], object], words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        ask(read_model("deepseek-v3.2"))


CASES = [
    ("deepseek-ai/DeepSeek-V3", 8, 1, 1, 8),
    ("deepseek-ai/DeepSeek-V3", 1, 16, 1, 16),
    ("deepseek-ai/DeepSeek-V3.2", 1, 32, 1, 32),
    ("Qwen/Qwen3-235B-A22B", 4, 1, 4, 1),
    ("Qwen/Qwen3-235B-A22B-FP8", 8, 1, 1, 8),
    ("Qwen/Qwen3-30B-A3B", 2, 2, 1, 4),
    ("openai/gpt-oss-120b", 2, 1, 1, 2),
    ("openai/gpt-oss-20b", 1, 1, 1, 1),
    ("zai-org/GLM-5", 1, 16, 1, 16),
]


def _as_simplified_there(model: Model) -> Model:
    """Every layer has experts, MXFP4 no scales, and only DeepSeek's kind an output head."""
    expert_bytes = 0.5 if model.expert_format == "mxfp4" else model.expert_bytes
    gqa = model.attention.kind == "gqa"
    return replace(model, dense_layers=0, expert_bytes=expert_bytes, tied=gqa)


@pytest.mark.parametrize(("name", "tp", "dp", "moe_tp", "ep"), CASES)
def test_agrees_with_aiconfigurator(name: str, tp: int, dp: int, moe_tp: int, ep: int) -> None:
    models = pytest.importorskip(
        "aiconfigurator_core.sdk.models", reason="needs afflux[plan] to compare with"
    )
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.config import ModelConfig

    theirs = models.get_model(
        name,
        ModelConfig(tp_size=tp, attention_dp_size=dp, moe_tp_size=moe_tp, moe_ep_size=ep),
        "trtllm",
    )
    file = Path(models.__file__).parents[2] / "systems" / "h200_sxm.yaml"
    database = SimpleNamespace(system_spec=yaml.safe_load(file.read_text()))
    usage = get_backend("trtllm")._get_memory_usage(theirs, database, 32, 1, 4096, 4096, 2048)
    ours = memory.worker(
        _as_simplified_there(read_model(name)),
        tp=tp,
        dp=dp,
        moe_tp=moe_tp,
        ep=ep,
        tokens=2048,
        requests=32,
        longest=8192,
    )
    gib = 1024**3
    assert ours.kv == pytest.approx(usage["kvcache"] * gib, rel=1e-9)
    assert ours.weights == pytest.approx(usage["weights"] * gib, rel=0.05)
    if name != "zai-org/GLM-5":  # there taken as 4096 wide, by a head_dim that is the rotary part's
        assert ours.activations == pytest.approx(usage["activations"] * gib, rel=1e-9)
    assert ours.buffers == pytest.approx((usage["nccl"] + usage["others"]) * gib, rel=1e-9)
    assert ours.total == pytest.approx(usage["total"] * gib, rel=0.04)
