"""What a MoE model is made of, from its Hugging Face config: sizes, weights and KV per side.

Published configs that come along are in ``bundled``; how many GPUs share a model and what that
takes of their memory is ``memory``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from planner.errors import PlannerError
from planner.explore.attention import BF16, Attention, read_attention
from planner.explore.bundled import bundled_models, find_config
from planner.explore.hf_keys import Keys
from planner.explore.precision import Format, read_precision

__all__ = [
    "BF16",
    "Attention",
    "Model",
    "bundled_models",
    "model_from_config",
    "read_model",
]

# what layers we know nothing about look like in a config, and what to call them
_UNKNOWN_LAYERS: Mapping[str, str] = {
    "hybrid_override_pattern": "state-space layers",
    "mamba_num_heads": "state-space layers",
    "ssm_state_size": "state-space layers",
    "hybrid_layer_pattern": "two kinds of attention heads",
    "linear_attn_config": "linear attention",
    "linear_num_key_heads": "linear attention",
    "compress_ratios": "compressed attention",
    "sparse_attention_config": "block-sparse attention",
    "attention_chunk_size": "chunked attention",
    "global_head_dim": "two kinds of attention heads",
    "moe_latent_size": "experts in a latent space",
    "routed_expert_hidden_size": "experts in a latent space",
}


@dataclass(frozen=True)
class Model:
    """A MoE model.

    Args:
        name: Hugging Face name or path.
        layers: all of them; ``dense_layers`` of them have no experts.
        hidden, vocab: sizes.
        dense_inter: intermediate size of the dense layers; 0 where there is none.
        experts, top_k: routed experts per layer, and per token.
        expert_inter: intermediate size of a routed expert.
        shared_inter: intermediate size of all shared experts together; 0: none.
        attention: of its layers.
        weight_bytes: per parameter outside of the routed experts, scales included. Embedding,
            output head and router are BF16 whatever this says.
        expert_bytes: per parameter of a routed expert, scales included.
        kv_bytes: per element of the KV cache.
        config: as read.
        weight_format, expert_format: "bf16", "fp8" (in blocks), "mxfp4", "nvfp4".
        tied: embedding and output head are one matrix.
    """

    name: str
    layers: int
    dense_layers: int
    hidden: int
    vocab: int
    dense_inter: int
    experts: int
    top_k: int
    expert_inter: int
    shared_inter: int
    attention: Attention
    weight_bytes: float
    expert_bytes: float
    kv_bytes: float
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    weight_format: Format = "bf16"
    expert_format: Format = "bf16"
    tied: bool = False

    @property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.layers - self.dense_layers

    @property
    def expert_parameters(self) -> int:
        """Of one routed expert: gate, up and down projection."""
        return 3 * self.hidden * self.expert_inter

    @property
    def shared_parameters(self) -> int:
        """Of the shared experts of one layer."""
        return 3 * self.hidden * self.shared_inter

    @property
    def dense_parameters(self) -> int:
        """Of the feed-forward part of one dense layer."""
        return 3 * self.hidden * self.dense_inter

    @property
    def router_parameters(self) -> int:
        """Of the router of one layer."""
        return self.hidden * self.experts

    @property
    def vocab_parameters(self) -> int:
        """Of the embedding, and as many of the output head."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> float:
        """All of them, without the layers for multi-token prediction, norms and biases."""
        heads = self.vocab_parameters * (1 if self.tied else 2)
        return self._always + heads + self.moe_layers * self.experts * self.expert_parameters

    @property
    def active_parameters(self) -> float:
        """Those that one token is multiplied with: an embedding's row is only looked up."""
        chosen = self.moe_layers * self.top_k * self.expert_parameters
        return self._always + self.vocab_parameters + chosen

    @property
    def _always(self) -> float:
        """Parameters of the layers that every token meets."""
        return (
            self.layers * self.attention.weights(self.hidden)
            + self.dense_layers * self.dense_parameters
            + self.moe_layers * (self.shared_parameters + self.router_parameters)
        )


def model_from_config(
    name: str,
    config: Mapping[str, Any],
    *,
    precision: Literal["fp8", "bf16"] | None = None,
    kv_precision: Literal["fp8", "bf16"] | None = None,
) -> Model:
    """A model from the contents of its config.json.

    Args:
        name: for people.
        config: as published.
        precision: of all weights; None: as the checkpoint is stored.
        kv_precision: of the KV cache; None: FP8 for FP8 weights, else BF16.

    Raises:
        PlannerError: no experts, keys missing (all are named), a number out of range, layers or a
            quantisation that aren't known here.
    """
    keys = Keys(config, name)
    experts = keys.whole_or(0, "n_routed_experts", "num_local_experts", "num_experts")
    if experts <= 1:
        raise PlannerError(
            f"{name} has no experts (none of n_routed_experts, num_local_experts, num_experts in "
            "its config): a dense model: nothing to disaggregate; give a mixture-of-experts model"
        )
    for key, what in _UNKNOWN_LAYERS.items():
        if keys.get(key) is not None:
            raise PlannerError(
                f"{name} has {what} ({key} in its config): such models can't be explored yet; "
                f"bundled are {', '.join(bundled_models())}"
            )
    layers, hidden = keys.whole("num_hidden_layers"), keys.whole("hidden_size")
    dense_layers = _dense_layers(keys, layers)
    expert_inter = keys.whole("moe_intermediate_size", "intermediate_size")
    dense_inter = 0
    if dense_layers:
        dense_inter = keys.whole("dense_intermediate_size", "intermediate_size")
    top_k = keys.whole("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    attention = read_attention(keys, layers, hidden)
    vocab = keys.whole("vocab_size")
    keys.check()
    if top_k > experts:
        raise PlannerError(f"{name} takes {top_k} of {experts} experts per token, expected fewer")
    if dense_layers >= layers:
        raise PlannerError(
            f"all {layers} layers of {name} are dense (first_k_dense_replace, decoder_sparse_step, "
            "mlp_only_layers): nothing to disaggregate"
        )
    stored = read_precision(keys, precision, kv_precision)
    return Model(
        name=name,
        layers=layers,
        dense_layers=dense_layers,
        hidden=hidden,
        vocab=vocab,
        dense_inter=dense_inter,
        experts=experts,
        top_k=top_k,
        expert_inter=expert_inter,
        shared_inter=_shared_inter(keys, expert_inter),
        attention=attention,
        weight_bytes=stored.weight_bytes,
        expert_bytes=stored.expert_bytes,
        kv_bytes=stored.kv_bytes,
        config=dict(config),
        weight_format=stored.weights,
        expert_format=stored.experts,
        tied=bool(keys.get("tie_word_embeddings")),
    )


def read_model(
    name_or_path: str | Path,
    *,
    precision: Literal["fp8", "bf16"] | None = None,
    kv_precision: Literal["fp8", "bf16"] | None = None,
) -> Model:
    """A model by the path of its config.json or of the folder that holds it, or by a bundled name.

    Bundled names are those of Hugging Face and short ones ("deepseek-v3.2"), in any case. A
    ``hf_quant_config.json`` beside a config.json counts.

    Raises:
        PlannerError: as ``model_from_config``; an unknown name (the nearest are offered); a file
            that isn't a config.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        name: str = str(name_or_path)
        config: Mapping[str, Any] = _with_quantisation(_load(path), path.parent)
    else:
        name, config = find_config(str(name_or_path))
    return model_from_config(name, config, precision=precision, kv_precision=kv_precision)


def _with_quantisation(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """ModelOpt's checkpoints say in a file of its own how they are quantised."""
    beside = folder / "hf_quant_config.json"
    if config.get("quantization_config") is not None or not beside.is_file():
        return config
    stated = _load(beside).get("quantization")
    if not isinstance(stated, dict):
        raise PlannerError(f"{beside} has no 'quantization': expected what ModelOpt writes")
    return config | {"quantization_config": {"quant_method": "modelopt", **stated}}


def _load(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlannerError(
            f"{path} can't be read as JSON ({error}): expected a config.json"
        ) from error
    if not isinstance(config, dict):
        raise PlannerError(f"{path} holds a {type(config).__name__}, expected a JSON object")
    return config


def _dense_layers(keys: Keys, layers: int) -> int:
    """Layers without experts, by whichever of the families' conventions the config uses."""
    listed = keys.get("mlp_layer_types")
    if listed is not None:
        return list(listed[:layers]).count("dense")
    step = keys.get("moe_layer_freq")
    if isinstance(step, list):
        return step[:layers].count(0)
    first = keys.whole_or(0, "first_k_dense_replace")
    every = keys.whole_or(1, "moe_layer_freq", least=1)
    sparse_step = keys.whole_or(1, "decoder_sparse_step", "interleave_moe_layer_step", least=1)
    only_dense = set(keys.get("mlp_only_layers") or ())
    return sum(
        layer < first or layer % every != 0 or (layer + 1) % sparse_step != 0 or layer in only_dense
        for layer in range(layers)
    )


def _shared_inter(keys: Keys, expert_inter: int) -> int:
    """Intermediate size of the shared experts together."""
    own = keys.whole_or(
        0, "shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim"
    )
    count = keys.whole_or(0, "n_shared_experts", "num_shared_experts")
    if own:
        return own * max(count, 1)
    return count * expert_inter
