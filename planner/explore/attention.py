"""Attention of a model's layers: grouped heads with windows, MLA, and MLA with an indexer (DSA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import PlannerError
from planner.explore.hf_keys import Keys

BF16 = 2
"""Bytes of what is never quantised here."""


@dataclass(frozen=True)
class Attention:
    """Attention of one layer.

    Args:
        kind: "gqa"; "mla" (DeepSeek-V3); "dsa", MLA with an indexer that picks ``index_topk``
            tokens (DeepSeek-V3.2).
        heads, kv_heads, head_dim: as in the config.
        window: tokens that windowed layers see; 0: none.
        windowed: layers with a window.
        q_rank, kv_rank, nope_dim, rope_dim, v_dim: of MLA, else 0. ``q_rank`` 0 in MLA: queries
            are projected in one go.
        index_heads, index_dim, index_topk: of DSA, else 0.
    """

    kind: Literal["gqa", "mla", "dsa"]
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    windowed: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    v_dim: int = 0
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0

    def weights(self, hidden: int, tp: int = 1) -> float:
        """Parameters of one layer's attention on one of ``tp`` GPUs.

        Heads are shared out; key/value heads are copied where there are fewer than GPUs; what
        makes the latents of MLA and the indexer are copied on all of them, as vLLM and
        TensorRT-LLM do.

        Raises:
            PlannerError: ``tp`` doesn't divide the heads.
        """
        heads = self.local_heads(tp)
        if self.kind == "gqa":
            return hidden * self.head_dim * (2 * heads + 2 * self.local_kv_heads(tp))
        down = hidden * (self.q_rank + self.kv_rank + self.rope_dim)
        up_q = (self.q_rank or hidden) * heads * (self.nope_dim + self.rope_dim)
        up_kv = self.kv_rank * heads * (self.nope_dim + self.v_dim)
        out = heads * self.v_dim * hidden
        index = (
            (self.q_rank or hidden) * self.index_heads * self.index_dim
            + hidden * self.index_dim
            + hidden * self.index_heads
        )
        return down + up_q + up_kv + out + (index if self.kind == "dsa" else 0)

    def token_bytes(self, kv_bytes: float, tp: int = 1) -> float:
        """Bytes of KV cache of one token in one layer on one of ``tp`` GPUs.

        MLA keeps a latent that all heads share, on every GPU. With DSA its rotary part stays BF16,
        and the indexer keeps one FP8 key and a float32 scale per 128 values of it (DeepSeek-V3.2;
        the same as ``indexer_cache_entry_bytes`` in aiconfigurator-core 0.12).
        """
        if self.kind == "gqa":
            return 2 * self.local_kv_heads(tp) * self.head_dim * kv_bytes
        if self.kind == "mla":
            return (self.kv_rank + self.rope_dim) * kv_bytes
        return self.kv_rank * kv_bytes + self.rope_dim * BF16 + self.index_bytes

    @property
    def index_bytes(self) -> float:
        """Bytes of the indexer's key of one token in one layer."""
        return self.index_dim + 4 * -(-self.index_dim // 128)

    def local_heads(self, tp: int) -> int:
        """Query heads on one of ``tp`` GPUs.

        Raises:
            PlannerError: ``tp`` doesn't divide them.
        """
        if tp < 1 or self.heads % tp:
            raise PlannerError(
                f"attention over {tp} GPUs: expected a number that divides the {self.heads} heads"
            )
        return self.heads // tp

    def local_kv_heads(self, tp: int) -> int:
        """Key/value heads on one of ``tp`` GPUs: at least one."""
        return -(-self.kv_heads // tp)


def read_attention(keys: Keys, layers: int, hidden: int) -> Attention:
    """Attention as a config says it; missing keys are noted in ``keys``.

    Raises:
        PlannerError: layers of a kind that isn't known here (linear attention, a shared indexer).
    """
    heads = keys.whole("num_attention_heads")
    kv_heads = keys.whole_or(heads, "num_key_value_heads", least=1)
    if keys.get("kv_lora_rank") is not None:
        nope, rope = keys.whole("qk_nope_head_dim"), keys.whole("qk_rope_head_dim")
        sparse = keys.get("index_topk") is not None
        if sparse and keys.whole_or(1, "index_topk_freq", least=1) > 1:
            raise PlannerError(
                f"{keys.name} shares an indexer between layers (index_topk_freq in its config): "
                "such models can't be explored yet"
            )
        return Attention(
            kind="dsa" if sparse else "mla",
            heads=heads,
            kv_heads=kv_heads,
            head_dim=nope + rope,
            q_rank=keys.whole_or(0, "q_lora_rank"),
            kv_rank=keys.whole("kv_lora_rank"),
            nope_dim=nope,
            rope_dim=rope,
            v_dim=keys.whole("v_head_dim"),
            index_heads=keys.whole("index_n_heads") if sparse else 0,
            index_dim=keys.whole("index_head_dim") if sparse else 0,
            index_topk=keys.whole("index_topk") if sparse else 0,
        )
    head_dim = keys.whole_or(hidden // heads, "head_dim", least=1)
    window, windowed = _windows(keys, layers)
    return Attention(
        kind="gqa",
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        windowed=windowed,
    )


def _windows(keys: Keys, layers: int) -> tuple[int, int]:
    """Tokens that a windowed layer sees, and how many layers are; 0, 0 without."""
    kinds: Any = keys.get("layer_types")
    if kinds is not None:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown:
            raise PlannerError(
                f"{keys.name} has layers of {', '.join(unknown)}, expected full_attention and "
                "sliding_attention only: such models can't be explored yet"
            )
        windowed = list(kinds[:layers]).count("sliding_attention")
        return (keys.whole("sliding_window"), windowed) if windowed else (0, 0)
    window = keys.whole_or(0, "sliding_window")
    if not window or keys.get("use_sliding_window") is False:
        return 0, 0
    # Qwen: the first ``max_window_layers`` see everything
    full = keys.whole_or(0, "max_window_layers") if keys.get("use_sliding_window") else 0
    return (window, layers - full) if layers > full else (0, 0)
