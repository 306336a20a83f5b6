"""Spans of a real engine: a traced request and its steps, exported by the actor's process."""

import pytest

from actors.engine import AttentionConfig
from actors.tracing import TracingConfig
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool
from tests.actors.actor_host import ActorHost
from tests.otlp import Receiver

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TOKENS = 12
ARGS = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
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
            prompts = [[place % 400 + 10 for place in range(150)], [5, 6, 7]]
            plain = actor.generate(prompts, TOKENS)
            headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            traced = actor.generate(prompts[:1], TOKENS, headers)
            assert traced.tokens == plain.tokens[:1]
            actor.call("stop")
        finally:
            host.kill()
            actor.kill()
    phases = {name: receiver.named(name) for name in ("queue", "prefill", "decode")}
    assert [len(spans) for spans in phases.values()] == [1, 1, 1], "the traced one alone"
    (queue,), (prefill,), (decode,) = phases.values()
    for span in (queue, prefill, decode):
        assert (span.trace, span.parent) == (TRACE, CALLER)
        assert span.resource["service.name"] == "afflux-attention"
        assert span.resource["actor_id"] == "attention-0"
    assert queue.begin <= queue.end == prefill.begin < prefill.end == decode.begin < decode.end
    assert queue.attributes["afflux.prompt_tokens"] == 150
    assert decode.attributes["afflux.tokens"] == TOKENS
    assert decode.attributes["afflux.end"] == "length"
    steps = receiver.named("step")
    inside = {
        phase.id: [step for step in steps if step.parent == phase.id] for phase in (prefill, decode)
    }
    assert sum(map(len, inside.values())) == len(steps) == decode.attributes["afflux.steps"]
    assert len(inside[decode.id]) == TOKENS - 1
    done = [step.attributes["afflux.request_tokens"] for step in inside[prefill.id]]
    assert sum(done) + prefill.attributes["afflux.cached_tokens"] >= 150
    for phase in (prefill, decode):
        for step in inside[phase.id]:
            assert phase.begin <= step.begin <= step.end <= phase.end
            assert step.attributes["afflux.compute_seconds"] > 0
            assert step.attributes["afflux.wait_seconds"] > 0
            assert step.attributes["afflux.epoch"] == 1
