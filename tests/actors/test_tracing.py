"""Spans of a real engine: a traced request and its steps, exported by the actor's process."""

import pytest

from actors.engine import AttentionConfig
from actors.tracing import TracingConfig
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool
from tests.actors.actor_host import ActorHost
from tests.otlp import Received, Receiver

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TOKENS = 12
BLOCK = 128
ARGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enable_prefix_caching": True,
    "block_size": BLOCK,
    "max_num_batched_tokens": 64,
    "enforce_eager": True,
}


@pytest.mark.timeout(500)
def test_a_traced_request(moe_checkpoint):
    model = str(moe_checkpoint("qwen3_moe"))
    host, actor = Remote(FFNHost), Remote(ActorHost)
    with Receiver() as receiver:
        tracing = TracingConfig(receiver.url, deployment="demo")
        try:
            pool = FFNPool([host], model, 1, 1, dtype="float32")
            actor.start(AttentionConfig("attention-0", model, "float32", ARGS, tracing=tracing))
            pool.connect(actor, "attention-0")
            actor.call("adopt", pool.table)
            prompt = [[place % 400 + 10 for place in range(150)]]
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            plain = actor.generate([[5, 6, 7]], TOKENS)
            traced = [actor.generate(prompt, TOKENS, headers) for _ in range(2)]
            assert [len(run.tokens[0]) for run in (plain, *traced)] == [TOKENS] * 3
            actor.call("stop")
        finally:
            host.kill()
            actor.kill()
    phases = [receiver.named(name) for name in ("queue", "prefill", "decode")]
    assert [len(spans) for spans in phases] == [2, 2, 2], "the traced ones alone"
    cold, warm = zip(*phases, strict=True)
    assert check(receiver, cold) == (0, [64, 64, 22]), "in parts"
    assert check(receiver, warm) == (BLOCK, [22]), "from the prefix cache"


def check(receiver: Receiver, phases: tuple[Received, ...]) -> tuple[int, list[int]]:
    """Spans of one request; returns the tokens from the cache and those of the prefill's steps."""
    queue, prefill, decode = phases
    for span in phases:
        assert (span.trace, span.parent) == (TRACE, CALLER)
        assert span.resource["service.name"] == "afflux-attention"
        assert span.resource["actor_id"] == "attention-0"
    assert queue.begin <= queue.end == prefill.begin < prefill.end == decode.begin < decode.end
    assert queue.attributes["afflux.prompt_tokens"] == 150
    assert decode.attributes["afflux.tokens"] == TOKENS
    assert decode.attributes["afflux.end"] == "length"
    steps = receiver.named("step")
    parts, rest = ([s for s in steps if s.parent == phase.id] for phase in (prefill, decode))
    assert len(rest) == TOKENS - 1
    assert len(parts) + len(rest) == decode.attributes["afflux.steps"]
    for phase, inside in ((prefill, parts), (decode, rest)):
        for step in inside:
            assert phase.begin <= step.begin <= step.end <= phase.end
            assert step.attributes["afflux.compute_seconds"] > 0
            assert step.attributes["afflux.wait_seconds"] > 0
            assert step.attributes["afflux.epoch"] == 1
    done = [step.attributes["afflux.request_tokens"] for step in parts]
    return prefill.attributes["afflux.cached_tokens"], done
