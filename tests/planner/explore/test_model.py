"""Models from Hugging Face configs: totals as published, formats, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from planner.errors import PlannerError
from planner.explore.model import bundled_models, model_from_config, read_model

PUBLISHED = {
    # model cards: all parameters and active ones
    "deepseek-v3": (671e9, 37e9),
    "qwen3-235b": (235e9, 22e9),
    "gpt-oss-120b": (117e9, 5.1e9),
    "gpt-oss-20b": (20.9e9, 3.6e9),
    "mixtral-8x7b": (46.7e9, 12.9e9),
    "mixtral-8x22b": (141e9, 39e9),
    "kimi-k2": (1.03e12, 32e9),
}

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name: str) -> None:
    total, active = PUBLISHED[name]
    model = read_model(name)
    assert model.parameters == pytest.approx(total, rel=0.02)
    assert model.active_parameters == pytest.approx(active, rel=0.02)


def test_parameters_by_hand() -> None:
    model = model_from_config("tiny", TINY)
    attention = 64 * 16 * (4 + 2 + 2 + 4)
    expert = 3 * 64 * 96
    head = 64 * 1000
    assert model.parameters == 2 * head + 6 * (attention + 64 * 8 + 8 * expert)
    assert model.active_parameters == head + 6 * (attention + 64 * 8 + 2 * expert)
    tied = model_from_config("tiny", TINY | {"tie_word_embeddings": True})
    assert tied.parameters == model.parameters - head


def test_deepseek_by_hand() -> None:
    model = read_model("deepseek-v3.2")
    assert (model.layers, model.dense_layers, model.moe_layers) == (61, 3, 58)
    assert (model.experts, model.top_k, model.expert_inter) == (256, 8, 2048)
    assert (model.shared_inter, model.dense_inter) == (2048, 18432)
    attention = model.attention
    assert (attention.kind, attention.index_topk) == ("dsa", 2048)
    mla = 7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    indexer = 1536 * 64 * 128 + 7168 * 128 + 7168 * 64
    assert attention.weights(7168) == mla + indexer
    assert read_model("deepseek-v3").attention.weights(7168) == mla


def test_every_other_layer_of_gpt_oss_has_a_window() -> None:
    attention = read_model("openai/gpt-oss-120b").attention
    assert (attention.window, attention.windowed) == (128, 18)


@pytest.mark.parametrize(
    ("added", "dense"),
    [
        ({}, 0),
        ({"first_k_dense_replace": 2}, 2),
        ({"decoder_sparse_step": 2}, 3),
        ({"mlp_only_layers": [0, 5]}, 2),
        ({"moe_layer_freq": [0, 1, 1, 1, 1, 1]}, 1),
        ({"mlp_layer_types": ["dense"] * 4 + ["sparse"] * 2}, 4),
        ({"interleave_moe_layer_step": 3}, 4),
    ],
)
def test_dense_layers_by_each_convention(added: dict[str, Any], dense: int) -> None:
    model = model_from_config("tiny", TINY | added)
    assert model.dense_layers == dense
    assert model.dense_inter == (96 if dense else 0)


@pytest.mark.parametrize(
    ("added", "shared"),
    [
        ({}, 0),
        ({"n_shared_experts": 2}, 2 * 96),
        ({"n_shared_experts": None}, 0),
        ({"shared_expert_intermediate_size": 40}, 40),
        ({"moe_intermediate_size": 32, "n_shared_experts": 1}, 32),
    ],
)
def test_shared_experts_by_each_convention(added: dict[str, Any], shared: int) -> None:
    assert model_from_config("tiny", TINY | added).shared_inter == shared


@pytest.mark.parametrize(
    ("added", "window"),
    [
        ({}, (0, 0)),
        ({"sliding_window": 32}, (32, 6)),
        ({"sliding_window": 32, "use_sliding_window": False}, (0, 0)),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 4}, (32, 2)),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 6}, (0, 0)),
    ],
)
def test_windows_by_each_convention(added: dict[str, Any], window: tuple[int, int]) -> None:
    attention = model_from_config("tiny", TINY | added).attention
    assert (attention.window, attention.windowed) == window


def test_formats() -> None:
    stored = read_model("gpt-oss-120b")
    assert (stored.weight_format, stored.expert_format) == ("bf16", "mxfp4")
    assert (stored.weight_bytes, stored.expert_bytes, stored.kv_bytes) == (2, 0.53125, 2)
    blocks = read_model("qwen3-235b-fp8")
    assert blocks.expert_bytes == 1 + 4 / 128**2
    assert blocks.kv_bytes == 1
    asked = read_model("qwen3-235b", precision="fp8")
    assert replace(asked, name=blocks.name) == blocks
    wide = read_model("deepseek-v3", precision="bf16", kv_precision="fp8")
    assert (wide.weight_bytes, wide.expert_bytes, wide.kv_bytes) == (2, 2, 1)
    fp4 = model_from_config(
        "tiny", TINY | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    )
    assert fp4.expert_bytes == 0.5 + 1 / 16


def test_names_files_and_folders(tmp_path: Path) -> None:
    by_name = read_model("OPENAI/GPT-oss-20B")
    assert by_name == read_model("gpt-oss-20b")
    assert by_name.name == "openai/gpt-oss-20b"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(by_name.config))
    for path in (file, tmp_path, str(file)):
        read = read_model(path)
        assert read.name == str(path)
        assert (read.parameters, read.attention) == (by_name.parameters, by_name.attention)
    for name in bundled_models():
        assert "huggingface.co" in read_model(name).config["_source"]


def test_modelopt_says_the_format_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    beside = tmp_path / "hf_quant_config.json"
    stated = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head", "model.layers.0.self_attn.q"]}
    beside.write_text(json.dumps({"quantization": stated}))
    model = read_model(tmp_path)
    assert (model.weight_format, model.expert_format, model.kv_bytes) == ("bf16", "nvfp4", 1)
    beside.write_text(json.dumps({"quantization": {"quant_algo": "MIXED_PRECISION"}}))
    with pytest.raises(PlannerError, match="quantised with modelopt mixed_precision"):
        read_model(tmp_path)
    assert read_model(tmp_path, precision="fp8").expert_format == "fp8"
    beside.write_text("{}")
    with pytest.raises(PlannerError, match="expected what ModelOpt writes"):
        read_model(tmp_path)


def test_multi_modal_configs_count_by_their_text_part() -> None:
    wrapped = {"architectures": ["X"], "text_config": TINY}
    assert model_from_config("x", wrapped).parameters == model_from_config("x", TINY).parameters


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": None}, "dense model: nothing to disaggregate"),
        ({"num_local_experts": 0}, "dense model: nothing to disaggregate"),
        (
            {"vocab_size": None, "num_experts_per_tok": None},
            "lacks num_experts_per_tok or .*, vocab_size",
        ),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_experts_per_tok": 9}, "takes 9 of 8 experts"),
        ({"first_k_dense_replace": 6}, "all 6 layers .* are dense"),
        ({"layer_types": ["linear_attention"] * 6}, "linear_attention"),
        ({"compress_ratios": [1]}, "compressed attention"),
        ({"ssm_state_size": 16}, "state-space layers"),
        ({"kv_lora_rank": 64}, "lacks qk_nope_head_dim, qk_rope_head_dim, v_head_dim"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with gptq"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
            "weight_block_size",
        ),
    ],
)
def test_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        model_from_config("tiny", TINY | change)


def test_refuses_unknown_names_files_and_overrides(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match=r"did you mean .*deepseek-v3\.2"):
        read_model("deepsek-v32")
    with pytest.raises(PlannerError, match=r"expected one of .*zai-org/GLM-5"):
        read_model("?")
    for text in ("{", "[]"):
        file = tmp_path / "config.json"
        file.write_text(text)
        with pytest.raises(PlannerError, match=r"config\.json"):
            read_model(file)
    with pytest.raises(PlannerError, match="precision is 'int8'"):
        read_model("glm-5", precision="int8")  # type: ignore[arg-type]
