"""Both roles with real vLLM engines: what their pages say after requests were served."""

import socket
from types import SimpleNamespace

import pytest

from actors.engine import AttentionConfig
from actors.metrics.config import MetricsConfig
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool
from tests.actors.actor_host import ActorHost
from tests.actors.metrics.test_both_sides import scrape, series_of

METRICS = MetricsConfig("tiny", expert_tokens=True)
BLOCK, BLOCKS = 128, 6  # one of them is never used
ARGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "block_size": BLOCK,
    "num_gpu_blocks_override": BLOCKS,
}


def prompt(number: int, length: int) -> list[int]:
    return [(number * 37 + place * 11) % 400 + 10 for place in range(length)]


@pytest.mark.timeout(500)
def test_pages_of_both_roles(moe_checkpoint):
    model = str(moe_checkpoint("qwen3_moe"))
    host, actor = Remote(FFNHost), Remote(ActorHost)
    try:
        pool = FFNPool([host], model, 1, 1, dtype="float32", metrics=METRICS)
        config = AttentionConfig("attention-0", model, "float32", ARGS, metrics=METRICS)
        actor.start(config)
        pool.connect(actor, "attention-0")
        actor.call("adopt", pool.table)
        attention = SimpleNamespace(address=actor.call("info")["metrics"])
        ffn = SimpleNamespace(address=pool.info()[0]["metrics"])
        assert {name for name, *_ in scrape(attention)} == series_of("attention")
        assert {name for name, *_ in scrape(ffn)} == series_of("ffn", "afd_ffn_expert_tokens_total")

        # Eight blocks are needed from token 129 on and five are there: some lose theirs.
        run = actor.generate([prompt(number, 120) for number in range(4)], 20)
        assert [len(tokens) for tokens in run.tokens] == [20] * 4
        for _ in range(2):
            actor.generate([prompt(9, 200)], 4)
        seen = scrape(attention)
        assert seen["afd_attention_preemptions_total",] >= 1
        assert seen["afd_attention_prefix_cache_queries_total",] >= 4 * 120 + 2 * 200
        assert seen["afd_attention_prefix_cache_hits_total",] >= BLOCK
        assert seen["afd_attention_batch_tokens_sum",] >= 4 * 139 + 203
        steps = seen["afd_attention_step_seconds_count",]
        assert steps >= 20 + 2 * 4
        parts = [seen[f"afd_attention_{part}_seconds_sum",] for part in ("compute", "wait")]
        assert all(part > 0 for part in parts)
        assert sum(parts) == pytest.approx(seen["afd_attention_step_seconds_sum",])
        assert seen["afd_attention_requests_running",] == 0
        assert seen["afd_attention_kv_cache_capacity_tokens",] == pytest.approx(
            BLOCKS * BLOCK, rel=0.2
        )
        assert seen["afd_table_epoch",] == 1
        assert seen["afd_transport_frames_total", "combine", "shm"] >= steps * 3
        assert seen["afd_transport_hop_seconds_count", "total"] >= steps * 3

        served = scrape(ffn)
        tokens = served["afd_ffn_batch_tokens_sum",]
        assert tokens == seen["afd_attention_batch_tokens_sum",] * 3  # layers
        assert served["afd_ffn_experts",] == 8 * 3
        assert served["afd_ffn_weight_bytes",] > 0
        assert sum(v for k, v in served.items() if k[0] == "afd_ffn_expert_tokens_total") > 0

        actor.call("stop")
        host.stop(pool.names[0])
        for page in (attention, ffn):
            name, _, port = page.address.rpartition(":")
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((name, int(port)), timeout=5)
    finally:
        host.kill()
        actor.kill()
