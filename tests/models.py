"""Makers of random small mixture-of-experts checkpoints for the tests.

Every family that the tests name lives here, because no model name may appear in ``actors/``.
Weights are drawn from a seed, wide enough that the logits of different tokens lie far apart and
greedy decoding meets no ties. Nothing here is trained: the models write nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 512
HIDDEN = 128
INTERMEDIATE = 64
EXPERTS = 8
TOP_K = 2

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )


def _deepseek_v3() -> Any:
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=2,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        # As published checkpoints say; vLLM reads the bias only then.
        topk_method="noaux_tc",  # pyright: ignore[reportCallIssue]
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        q_lora_rank=64,
        kv_lora_rank=512,  # 512 + 64: the one latent size that vLLM's CPU kernels take
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        rope_interleave=True,
        # Published checkpoints scale RoPE. Without, vLLM 0.32 on CPU calls a kernel that ignores
        # the strides of the query's RoPE part, and plain vLLM's own results depend on the batch.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )


def _mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )


def _olmoe() -> Any:
    from transformers import OlmoeConfig

    return OlmoeConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )


def _granitemoe() -> Any:
    from transformers import GraniteMoeConfig

    return GraniteMoeConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        attention_multiplier=0.125,
        residual_multiplier=0.5,
    )


def _qwen2_moe() -> Any:
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=False,
    )


def _glm4_moe() -> Any:
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        first_k_dense_replace=1,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=TOP_K,
        routed_scaling_factor=1.5,
    )


def _llama4() -> Any:
    from transformers import Llama4TextConfig

    return Llama4TextConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=None,
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=64,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )


def _ernie4_5_moe() -> Any:
    from transformers import Ernie4_5_MoeConfig

    return Ernie4_5_MoeConfig(
        **_COMMON,
        intermediate_size=256,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    )


def _flex_olmo() -> Any:
    """vLLM has no class of its own for this one and runs the transformers implementation."""
    from transformers import FlexOlmoConfig

    return FlexOlmoConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=3,
        num_key_value_heads=1,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "granitemoe": _granitemoe,
    "qwen2_moe": _qwen2_moe,
    "glm4_moe": _glm4_moe,
    "llama4": _llama4,
    "gpt_oss": _gpt_oss,
    "ernie4_5_moe": _ernie4_5_moe,
    "flex_olmo": _flex_olmo,
}


def make_moe(
    family: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Path:
    """Write a random checkpoint of a family and return its folder.

    Args:
        family: a key of ``CONFIGS``.
        folder: where to write; created.
        changes: fields of the family's configuration to set otherwise.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = CONFIGS[family]()
    for field, value in changes.items():
        setattr(config, field, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # Left at zero, these would hide an error in how they are carried.
            if "correction_bias" in name or name.endswith(("_proj_bias", "sinks", "q_proj.bias")):
                tensor.data.uniform_(-0.2, 0.2)
    model.save_pretrained(folder)
    return folder


def stack_experts(source: Path, folder: Path) -> Path:
    """Copy a checkpoint of single experts into one with stacked 3-D tensors per layer.

    ``experts.<i>.{gate,up,down}_proj.weight`` become ``experts.gate_up_proj`` [E, 2I, H] and
    ``experts.down_proj`` [E, H, I], the layout that newer families use on disk.
    """
    tensors = load_file(source / "model.safetensors")
    stacked: dict[str, torch.Tensor] = {}
    groups: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        head, found, tail = name.partition(".experts.")
        if found:
            expert, part, _ = tail.split(".")
            groups.setdefault(head, {}).setdefault(int(expert), {})[part] = tensor
        else:
            stacked[name] = tensor
    for head, experts in groups.items():
        each = [experts[e] for e in sorted(experts)]
        stacked[f"{head}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([e["gate_proj"], e["up_proj"]]) for e in each]
        )
        stacked[f"{head}.experts.down_proj"] = torch.stack([e["down_proj"] for e in each])
    folder.mkdir(parents=True)
    save_file(stacked, folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def make_dense(folder: Path, *, seed: int = 0) -> Path:
    """Write a random small model without experts, for the tests of its refusal."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint, parsed."""
    return json.loads((folder / "config.json").read_text())


class ReferenceExperts:
    """The routed experts of one layer, computed in float64 straight from the checkpoint.

    Knows every family of ``CONFIGS``: the names and layouts of their tensors, interleaved gates,
    biases, and routing weights that scale the input.
    """

    def __init__(self, folder: Path, layer: int):
        self._config = read_config(folder)
        prefix = f"model.layers.{layer}."
        self._tensors = {
            name.removeprefix(prefix): tensor.double()
            for name, tensor in load_file(folder / "model.safetensors").items()
            if name.startswith(prefix)
        }

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, H], global ids and weights [T, K] -> weighted sum over each token's experts."""
        result = torch.zeros_like(x, dtype=torch.float64)
        for token in range(len(x)):
            for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
                hidden = x[token].double()
                if self._config["model_type"] == "llama4_text":
                    result[token] += self._expert(expert, hidden * weight)
                else:
                    result[token] += weight * self._expert(expert, hidden)
        return result

    def _expert(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        if self._config["model_type"] == "gpt_oss":
            return self._gpt_oss(expert, x)
        gate, up, down = self._matrices(expert)
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    def _matrices(self, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate [I, H], up [I, H] and down [H, I]."""
        for names in (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")):
            own = [self._find(f"experts.{expert}.{name}.weight") for name in names]
            if own[0] is not None:
                return own[0], own[1], own[2]  # pyright: ignore[reportReturnType]
        both, down = self._find("experts.gate_up_proj"), self._find("experts.down_proj")
        if both is None or down is None:
            both, down = self._find("input_linear.weight"), self._find("output_linear.weight")
        assert both is not None
        assert down is not None
        both, down = both[expert], down[expert]
        if self._config["model_type"] == "llama4_text":
            both, down = both.T, down.T
        gate, up = both.chunk(2)
        return gate, up, down

    def _gpt_oss(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        part = {
            name: self._tensors[f"mlp.experts.{name}"][expert]
            for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        }
        both = x @ part["gate_up_proj"] + part["gate_up_proj_bias"]
        gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return hidden @ part["down_proj"] + part["down_proj_bias"]

    def _find(self, suffix: str) -> torch.Tensor | None:
        return next((t for name, t in self._tensors.items() if name.endswith("." + suffix)), None)
