"""How much KV cache an engine gets on a CPU: vLLM's environment variable must not win."""

from __future__ import annotations

import os
from typing import Any

import pytest

from actors.engine import _size_kv_cache

VARIABLE = "VLLM_CPU_KVCACHE_SPACE"


def sized(**engine: Any) -> dict[str, Any]:
    _size_kv_cache(engine)
    return engine


def test_a_gibibyte_when_nothing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert sized() == {"kv_cache_memory_bytes": 1 << 30}


def test_the_variable_counts_when_the_spec_says_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "3")
    assert sized(max_num_seqs=4) == {"max_num_seqs": 4}
    assert os.environ[VARIABLE] == "3"


@pytest.mark.parametrize(
    "engine", [{"kv_cache_memory_bytes": 1 << 26}, {"gpu_memory_utilization": 0.5}]
)
def test_what_the_spec_says_wins(monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]):
    monkeypatch.setenv(VARIABLE, "3")
    assert sized(**engine) == engine
    assert VARIABLE not in os.environ
