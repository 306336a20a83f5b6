"""The attention side alone and with a misbehaving pool: memory, refusals, deadlines."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from actors.checkpoint import Checkpoint
from actors.engine import AttentionConfig, AttentionEngine
from actors.errors import AffluxError, CheckpointError
from actors.table import ExpertTable
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool, attention_process
from benchmarks.tokens import engine_args, prompts
from tests.models import VOCAB

ARGS = engine_args(prefix_cache=True, chunked_prefill=True)


class Deployment:
    """One attention engine and two FFN actors in processes of their own."""

    def __init__(self, model: str):
        self.model = model
        self.hosts = [Remote(FFNHost), Remote(FFNHost)]  # all three start at the same time
        self.attention = attention_process(
            AttentionConfig("attention-0", model, "float32", ARGS, lanes=2, timeout_s=1.5)
        )
        self.pool = FFNPool(self.hosts, model, 2, 1, dtype="float32")
        self.pool.connect(self.attention, "attention-0")

    def close(self) -> None:
        for process in (*self.hosts, self.attention):
            process.kill()


@pytest.fixture(scope="module")
def model(moe_checkpoint):
    return str(moe_checkpoint("deepseek_v3"))


@pytest.fixture(scope="module")
def deployment(model):
    made = Deployment(model)
    yield made
    made.close()


@pytest.mark.timeout(300)
def test_each_side_holds_its_own_weights_only(deployment, model):
    checkpoint = Checkpoint.open(model)
    routed = sum(
        info.nbytes for name, info in checkpoint.tensors.items() if checkpoint.routed(name)
    )
    other = sum(
        info.nbytes for name, info in checkpoint.tensors.items() if not checkpoint.routed(name)
    )
    facts = deployment.attention.facts()
    # a router's bias per expert, which the layer only refers to; no weight of an expert
    assert set(facts["expert_parameters"]) <= {"e_score_correction_bias"}
    assert not [name for name in facts["tensors_read"] if checkpoint.routed(name)]
    # buffers (RoPE tables) come on top of the checkpoint's own tensors; routed experts would show
    assert other <= facts["weight_bytes"] < other + routed / 2
    shards = [info["allocated_bytes"] for info in deployment.pool.info()]
    assert sum(shards) == routed


@pytest.mark.timeout(300)
def test_no_table_is_an_error_not_a_hang(deployment):
    run = deployment.attention.generate(prompts(VOCAB)[:2], 4)
    assert len(run.errors) == 2
    assert "no expert table" in run.errors[0]


@pytest.mark.timeout(300)
def test_a_table_of_another_model_or_stranger_is_refused(deployment):
    with pytest.raises(AffluxError, match="MoE layers are"):
        deployment.attention.adopt(ExpertTable(5, {0: (("ffn1-0",),)}))
    strangers = ExpertTable(6, dict.fromkeys(deployment.pool.table.layers, (("nobody",),) * 16))
    deployment.attention.adopt(strangers)
    run = deployment.attention.generate(prompts(VOCAB)[:1], 2)
    assert "names ['nobody']" in run.errors[0]
    deployment.attention.adopt(deployment.pool.table)
    assert deployment.attention.generate(prompts(VOCAB)[:1], 2).errors == []


@pytest.mark.timeout(300)
def test_a_frozen_ffn_actor_fails_the_step_after_its_deadline(deployment):
    attention, pool = deployment.attention, deployment.pool
    attention.adopt(pool.table)
    expected = attention.generate(prompts(VOCAB)[:4], 6).tokens
    frozen = deployment.hosts[1].process.pid
    os.kill(frozen, signal.SIGSTOP)
    try:
        began = time.monotonic()
        run = attention.generate(prompts(VOCAB, wave=1)[:4], 6)
        assert time.monotonic() - began < 20
        assert len(run.errors) == 4
        for words in ("no answer from ffn1-1", "layer 1", "within 1.5 s", "last frame from ffn1-1"):
            assert words in run.errors[0]
        assert "COMBINE" in run.errors[0]
    finally:
        os.kill(frozen, signal.SIGCONT)
    # late answers to the failed step are ignored, and the engine goes on
    assert attention.generate(prompts(VOCAB)[:4], 6).tokens == expected


@pytest.mark.timeout(300)
def test_two_attention_engines_share_a_pool(deployment):
    second = attention_process(
        AttentionConfig("attention-1", deployment.model, "float32", ARGS, lanes=1, timeout_s=5.0)
    )
    try:
        deployment.pool.connect(second, "attention-1")
        second.adopt(deployment.pool.table)
        deployment.attention.adopt(deployment.pool.table)
        with ThreadPoolExecutor(2) as both:
            runs = [
                both.submit(engine.generate, prompts(VOCAB), 12)
                for engine in (deployment.attention, second)
            ]
            first, other = (run.result() for run in runs)
        assert first.errors == other.errors == []
        assert first.tokens == other.tokens
        assert {peer for info in deployment.pool.info() for peer in info["peers"]} == {
            "attention-0",
            "attention-1",
        }
    finally:
        second.kill()


@pytest.mark.timeout(300)
def test_a_killed_ffn_actor_fails_the_step_at_once(deployment):
    attention, pool = deployment.attention, deployment.pool
    attention.adopt(pool.table)
    attention.generate(prompts(VOCAB)[:2], 2)
    deployment.hosts[0].kill()
    began = time.monotonic()
    run = attention.generate(prompts(VOCAB)[:2], 4)
    assert time.monotonic() - began < 1.5
    assert len(run.errors) == 2
    assert "ffn1-0" in run.errors[0]


def test_engine_arguments_that_afflux_owns_are_refused(model):
    config = AttentionConfig("a", model, "float32", {"worker_cls": "mine", "max_num_seqs": 2})
    with pytest.raises(AffluxError, match=r"\['worker_cls'\], which afflux decides itself"):
        AttentionEngine(config)


def test_a_dense_model_is_refused(dense_checkpoint):
    with pytest.raises(CheckpointError, match="dense model"):
        AttentionEngine(AttentionConfig("a", str(dense_checkpoint)))
