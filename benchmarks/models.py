"""Random checkpoints for the benchmarks: shapes of small mixtures of experts, random weights."""

from pathlib import Path
from typing import Any

BALANCED: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 160,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
}
"""Attention and FFN times near equal on one core each at the batches the benchmark looks at."""

FFN_HEAVY: dict[str, Any] = BALANCED | {
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
}
"""FFN time dominates: what elastic sizing would answer with more FFN actors."""


def make_model(folder: Path, shape: dict[str, Any], seed: int = 0) -> Path:
    """Write a random bfloat16 checkpoint of a shape, unless it is there; returns the folder."""
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        intermediate_size=1024,
        max_position_embeddings=4096,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        **shape,
    )
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder
