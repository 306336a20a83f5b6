"""The attention side with real engines: memory, refusals, lost, frozen and replaced holders."""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actors.checkpoint import Checkpoint
from actors.emulate import Emulation, Line
from actors.engine import AttentionConfig, AttentionEngine
from actors.errors import AffluxError, CheckpointError
from actors.ffn import FFNConfig
from actors.table import ExpertTable
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool, attention_process
from benchmarks.tokens import engine_args, prompts
from tests.actors.actor_host import ActorHost
from tests.models import VOCAB

ARGS = engine_args(prefix_cache=True, chunked_prefill=True)


class Deployment:
    """An engine and an attention actor, two shards, and FFN actors that hold everything.

    ``full-0``, ``full-1`` and ``full-2`` are in processes of their own; the first two share theirs
    with the shards ``ffn1-0`` and ``ffn1-1``.
    """

    def __init__(self, model: str):
        self.model = model
        self.hosts = [Remote(FFNHost) for _ in range(3)]  # all start at the same time
        self.attention = attention_process(
            AttentionConfig(
                "attention-0", model, "float32", ARGS, lanes=2, timeout_s=3.0, wait_s=0.5
            )
        )
        self.actor = Remote(ActorHost)
        self.pool = FFNPool(self.hosts[:2], model, 2, 1, dtype="float32")
        self.pool.connect(self.attention, "attention-0")
        self.actor.start(
            AttentionConfig("attention-1", model, "float32", ARGS, lanes=2, timeout_s=3.0)
        )
        self.pool.connect(self.actor, "attention-1")
        self.actor.call("adopt", self.pool.table)
        checkpoint = Checkpoint.open(model)
        self.everything = {
            layer: list(range(checkpoint.num_experts)) for layer in checkpoint.moe_layers
        }
        for number in range(3):
            self.add_full(number, number)

    def add_full(self, number: int, host: int) -> None:
        """Start ``full-<number>`` and introduce it to the attention actor."""
        name = f"full-{number}"
        self.hosts[host].start(
            FFNConfig(name, self.model, self.everything, dtype="float32", threads=1)
        )
        theirs = self.hosts[host].offer(name, "attention-1")
        self.hosts[host].connect(name, self.actor.offer(name))
        self.actor.connect(theirs)

    def table(self, epoch: int, *holders: str) -> ExpertTable:
        """Expert ``e`` is held by the actors of ``holders[e % len(holders)]``."""
        named = [tuple(f"full-{number}" for number in held.split()) for held in holders]
        return ExpertTable(
            epoch,
            {
                layer: tuple(named[expert % len(named)] for expert in experts)
                for layer, experts in self.everything.items()
            },
        )

    def close(self) -> None:
        for process in (*self.hosts, self.attention, self.actor):
            process.kill()


@pytest.fixture(scope="module")
def model(moe_checkpoint):
    return str(moe_checkpoint("deepseek_v3"))


@pytest.fixture(scope="module")
def deployment(model):
    made = Deployment(model)
    yield made
    made.close()


@pytest.mark.timeout(500)
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


@pytest.mark.timeout(500)
def test_no_table_is_an_error_not_a_hang(deployment):
    run = deployment.attention.generate(prompts(VOCAB)[:2], 4)
    assert len(run.errors) == 2
    assert "no expert table" in run.errors[0]


@pytest.mark.timeout(500)
def test_a_table_of_another_model_or_stranger_is_refused(deployment):
    with pytest.raises(AffluxError, match="MoE layers are"):
        deployment.attention.adopt(ExpertTable(5, {0: (("ffn1-0",),)}))
    strangers = ExpertTable(6, dict.fromkeys(deployment.pool.table.layers, (("nobody",),) * 16))
    with pytest.raises(AffluxError, match=r"names \['nobody'\]"):
        deployment.attention.adopt(strangers)
    deployment.attention.adopt(deployment.pool.table)
    assert deployment.attention.generate(prompts(VOCAB)[:1], 2).errors == []


@pytest.mark.timeout(500)
def freeze(pid: int) -> None:
    """SIGSTOP, and wait until every thread has stopped."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while any(
        task.read_text().rpartition(")")[2].split()[0] != "T"
        for task in Path(f"/proc/{pid}/task").glob("*/stat")
    ):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_another_holder_and_a_newer_table_the_step_fails(deployment):
    attention = deployment.attention
    attention.adopt(deployment.pool.table)
    expected = attention.generate(prompts(VOCAB)[:4], 6).tokens
    frozen = deployment.hosts[1].process.pid
    freeze(frozen)
    try:
        began = time.monotonic()
        run = attention.generate(prompts(VOCAB, wave=1)[:4], 6)
        assert time.monotonic() - began < 60
        assert len(run.errors) == 4
        assert run.errors[0].startswith("[no_holder] ")
        for words in (
            "no answer from ffn1-1",
            "layer 1",
            "within 3 s",
            "last frame from ffn1-1: COMBINE",
            "no newer expert table within 0.5 s",
        ):
            assert words in run.errors[0]
    finally:
        os.kill(frozen, signal.SIGCONT)
    # connected anew it serves again; the failed step left nothing wrong in the prefix cache
    theirs = deployment.hosts[1].offer("ffn1-1", "attention-0")
    deployment.hosts[1].connect("ffn1-1", attention.offer("ffn1-1"))
    attention.connect(theirs)
    assert attention.generate(prompts(VOCAB)[:4], 6).tokens == expected
    again = attention.generate(prompts(VOCAB, wave=1)[:4], 6)
    assert again.errors == []
    plain = deployment.actor.generate(prompts(VOCAB, wave=1)[:4], 6)
    assert again.tokens == plain.tokens  # of an engine that nothing happened to


@pytest.mark.timeout(500)
def test_two_attention_engines_share_a_pool(deployment):
    with ThreadPoolExecutor(2) as both:
        runs = [
            both.submit(engine.generate, prompts(VOCAB), 12)
            for engine in (deployment.attention, deployment.actor)
        ]
        first, other = (run.result() for run in runs)
    assert first.errors == other.errors == []
    assert first.tokens == other.tokens
    assert {peer for info in deployment.pool.info() for peer in info["peers"]} == {
        "attention-0",
        "attention-1",
    }


@pytest.fixture(scope="module")
def expected(deployment):
    """Tokens of the first wave of prompts, from a pool that nothing happens to."""
    return deployment.attention.generate(prompts(VOCAB), 24).tokens


@pytest.mark.timeout(500)
def test_an_idle_actor_adopts_at_once_and_tells_what_it_uses(deployment, expected):
    actor = deployment.actor
    table = deployment.table(10, "0", "1", "2")
    assert actor.call("adopt", table) == 10
    assert actor.call("adopt", table) == 10
    with pytest.raises(AffluxError, match="epoch 9 comes after epoch 10"):
        actor.call("adopt", deployment.table(9, "0"))
    actor.call("remember", {"number": 7, "text": "new"})
    actor.call("remember", {"number": 6, "text": "old"})
    info = actor.call("info")
    assert info["table"] == table
    assert info["note"] == {"number": 7, "text": "new"}
    assert actor.generate(prompts(VOCAB), 24).tokens == expected
    seen = actor.call("watch", timeout_s=0.0)
    assert (seen["state"], seen["epoch"], seen["faults"]) == ("ready", 10, [])
    assert (seen["number"], seen["running"], seen["waiting"]) == (0, 0, 0)


@pytest.mark.timeout(500)
def test_emulated_attention_takes_time_by_context_tokens(deployment):
    actor, prompt = deployment.actor, [list(range(5, 65))]
    expected = actor.generate(prompt, 4).tokens
    actor.emulate(Emulation(attention=Line(2e-4, 0.0)))
    try:
        began = time.monotonic()
        assert actor.generate(prompt, 4).tokens == expected
        elapsed = time.monotonic() - began
    finally:
        actor.emulate(None)
    # the prefix cache gives back whole blocks of the prompt, which count as context all the same
    context = 60 + 61 + 62 + 63
    assert elapsed >= 2e-4 * context * len(deployment.everything)


@pytest.mark.timeout(500)
def test_a_frozen_holder_is_replaced_by_its_replicas(deployment, expected):
    actor, host = deployment.actor, deployment.hosts[2]
    actor.call("adopt", deployment.table(20, "0 2", "1", "2 1", "1 2 0"))
    assert actor.generate(prompts(VOCAB), 24).tokens == expected
    actor.begin("run", prompts(VOCAB), 24)
    actor.wait_for_tokens(10)
    os.kill(host.process.pid, signal.SIGSTOP)
    try:
        run = actor.end("run")
    finally:
        os.kill(host.process.pid, signal.SIGCONT)
    assert run.errors == []
    assert run.tokens == expected
    seen = actor.call("watch")
    assert [(fault.peer, fault.kind) for fault in seen["faults"]] == [("full-2", "silent")]
    assert actor.call("watch", seen["number"], 0.0)["faults"] == []
    # its late answers are no harm
    assert actor.generate(prompts(VOCAB), 24).tokens == expected
    theirs = host.offer("full-2", "attention-1")
    host.connect("full-2", actor.offer("full-2"))
    actor.connect(theirs)
    before = host.info("full-2")["frames"]
    assert actor.generate(prompts(VOCAB), 24).tokens == expected
    assert host.info("full-2")["frames"] > before


@pytest.mark.timeout(500)
def test_a_killed_holder_is_replaced_by_its_replicas(deployment, expected):
    actor, host = deployment.actor, deployment.hosts[2]
    number = actor.call("watch", timeout_s=0.0)["number"]
    actor.begin("run", prompts(VOCAB), 24)
    actor.wait_for_tokens(10)
    host.kill()
    seen = actor.call("watch", number, 30.0)
    run = actor.end("run")
    assert [(fault.peer, fault.kind) for fault in seen["faults"]] == [("full-2", "lost")]
    assert run.errors == []
    assert run.tokens == expected


@pytest.mark.timeout(500)
def test_a_step_that_lost_its_experts_waits_for_a_table(deployment, expected):
    actor = deployment.actor
    actor.call("adopt", deployment.table(30, "0", "1"))
    number = actor.call("watch", timeout_s=0.0)["number"]
    actor.begin("run", prompts(VOCAB), 24)
    actor.wait_for_tokens(10)
    deployment.hosts[0].kill()
    assert actor.call("watch", number, 30.0)["faults"]
    deadline = time.monotonic() + 30
    while not (seen := actor.call("watch", timeout_s=0.0))["stalled_s"]:
        assert time.monotonic() < deadline
    assert seen["running"] + seen["waiting"] > 0
    actor.call("disconnect", "full-0")
    with pytest.raises(AffluxError, match=r"names \['full-0'\]"):
        actor.call("adopt", deployment.table(31, "0", "1"))
    deployment.add_full(3, host=1)  # connecting needs no engine thread
    assert actor.call("adopt", deployment.table(32, "3", "1")) == 32
    run = actor.end("run")
    assert run.errors == []
    assert run.tokens == expected
    assert actor.call("watch", timeout_s=0.0)["stalled_s"] == 0.0


@pytest.mark.timeout(500)
def test_an_actor_stops_while_a_step_waits(deployment):
    actor = deployment.actor
    number = actor.call("watch", timeout_s=0.0)["number"]
    actor.begin("run", prompts(VOCAB), 24)
    actor.wait_for_tokens(10)
    deployment.hosts[1].kill()
    assert actor.call("watch", number, 30.0)["faults"]
    began = time.monotonic()
    actor.call("stop")
    assert time.monotonic() - began < 60
    assert actor.call("ping") == "stopped"
    errors = actor.end("run").errors
    assert len(errors) == 12
    assert errors[0].startswith("[no_holder]")


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.timeout(400)
def test_a_compiled_step_is_repeated_in_all_lanes(model):
    host, actor = Remote(FFNHost), Remote(ActorHost)
    try:
        args = engine_args(prefix_cache=True, chunked_prefill=True, eager=False)
        actor.start(AttentionConfig("attention-0", model, "float32", args, lanes=3, timeout_s=30.0))
        pool = FFNPool([host], model, 2, 1, dtype="float32")
        spare = FFNPool([host], model, 2, 2, dtype="float32")
        pool.connect(actor, "attention-0")
        spare.connect(actor, "attention-0")
        actor.call("adopt", pool.table)
        expected = actor.generate(prompts(VOCAB), 24).tokens
        actor.begin("run", prompts(VOCAB), 24)
        actor.wait_for_tokens(10)
        host.stop("ffn1-1")
        (fault,) = actor.call("watch", 0, 30.0)["faults"]
        assert (fault.peer, fault.kind) == ("ffn1-1", "lost")
        actor.call("adopt", spare.table)
        run = actor.end("run")
        assert run.errors == []
        assert run.tokens == expected
        assert actor.call("info")["stats"]["interrupted"] == 1
    finally:
        host.kill()
        actor.kill()


def test_engine_arguments_that_afflux_owns_are_refused(model):
    config = AttentionConfig("a", model, "float32", {"worker_cls": "mine", "max_num_seqs": 2})
    with pytest.raises(AffluxError, match=r"\['worker_cls'\], which afflux decides itself"):
        AttentionEngine(config)


def test_a_dense_model_is_refused(dense_checkpoint):
    with pytest.raises(CheckpointError, match="dense model"):
        AttentionEngine(AttentionConfig("a", str(dense_checkpoint)))
