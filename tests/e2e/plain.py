"""Plain vLLM's tokens for the prompts of ``streams``, from a process of its own."""

from __future__ import annotations

import functools

from benchmarks.offline import PlainEngine
from benchmarks.processes import Remote
from cluster.paths import project_root
from tests.e2e.streams import PROMPTS


def plain_tokens(count: int) -> dict[str, list[int]]:
    """Prompt -> so many tokens, greedy, whatever ends a text."""
    from transformers import AutoTokenizer

    path = str(project_root() / "deploy/models/verse")
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = {"max_model_len": 1024, "enforce_eager": True, "kv_cache_memory_bytes": 128 << 20}
    plain = Remote(functools.partial(PlainEngine, path, "float32", engine))
    try:
        ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        found = plain.generate(ids, count).tokens
        return {prompt: list(tokens) for prompt, tokens in zip(PROMPTS, found, strict=True)}
    finally:
        plain.kill()
