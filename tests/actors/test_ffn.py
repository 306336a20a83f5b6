"""The FFN loop: its decisions with a fake endpoint, then the whole actor over the real wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actors.checkpoint import Checkpoint
from actors.emulate import Emulation, Line
from actors.errors import (
    AffluxError,
    CheckpointError,
    FrameError,
    PeerLost,
    PeerMismatch,
    PeerRefused,
)
from actors.ffn import FFNActor, FFNConfig, FFNWorker, preload
from actors.transport.endpoint import Arrival, Endpoint
from actors.transport.frame import DENSE, FrameHeader, Kind
from actors.transport.geometry import Geometry
from tests.models import ReferenceExperts

HIDDEN = 4


@dataclass
class FakeEndpoint:
    """Hands out prepared arrivals and keeps what was answered."""

    batches: list[list[Any]] = field(default_factory=list)
    answers: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    refusals: list[tuple[str, str]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    spans: list[float] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    disconnected: list[str] = field(default_factory=list)

    @property
    def lost(self) -> dict[str, str]:
        return dict.fromkeys(self.gone, "gone")

    def poll(self) -> list[Any]:
        return self.batches.pop(0) if self.batches else []

    def result_view(self, arrival: Any, tokens: int) -> torch.Tensor:
        if arrival.peer in self.gone:
            raise PeerLost(f"{arrival.peer} is gone")
        view = torch.empty(tokens, HIDDEN)
        self.answers[arrival.peer, arrival.header.lane] = view
        return view

    def combine(self, arrival: Any, *, compute_start_ns: int, compute_end_ns: int) -> None:
        assert arrival.back_ns <= compute_start_ns <= compute_end_ns
        self.spans.append((compute_end_ns - compute_start_ns) / 1e9)

    def refuse(self, arrival: Any, code: str, text: str) -> None:
        self.refusals.append((arrival.peer, code))
        self.texts.append(text)

    def disconnect(self, peer: str) -> None:
        self.disconnected.append(peer)


class FakeShard:
    """Doubles what it is given, refuses expert 9 and fails on expert 8."""

    num_experts = 10

    def __init__(self) -> None:
        self.calls: list[int] = []

    def compute(self, layer, x, ids, weights, rows, out=None):
        self.calls.append(len(x))
        if (ids == 9).any():
            raise FrameError("no expert 9 here", code="unknown_expert")
        if (ids == 8).any():
            raise RuntimeError("kernel panic")
        result = torch.zeros_like(x).index_add_(0, rows, 2 * x[rows])
        return result if out is None else out.copy_(result)


def arrival(
    peer: str, value: float, *, layer=0, lane=0, tokens=2, expert=0, epoch=1, step=1, chunk=0
) -> SimpleNamespace:
    header = FrameHeader(
        Kind.DISPATCH, 3, 0, lane, layer, chunk, 1, tokens, tokens, epoch, 0, 0, step, b"digest00"
    )
    return SimpleNamespace(
        peer=peer,
        header=header,
        back_ns=time.monotonic_ns(),
        x=torch.full((tokens, HIDDEN), value),
        ids=torch.full((tokens,), expert, dtype=torch.int32),
        weights=torch.ones(tokens),
        rows=torch.arange(tokens, dtype=torch.int32),
    )


def served(
    *batches: list[Any], gone: tuple[str, ...] = (), **options: Any
) -> tuple[FFNWorker, Any, FakeShard]:
    endpoint, shard = FakeEndpoint(list(batches), gone=set(gone)), FakeShard()
    worker = FFNWorker(shard, endpoint, merge_tokens=8, **options)  # type: ignore[arg-type]
    while worker.turn():
        pass
    return worker, endpoint, shard


def test_frames_of_one_layer_share_a_kernel_call():
    worker, endpoint, shard = served(
        [arrival("a", 1.0), arrival("b", 2.0, tokens=3), arrival("a", 3.0, layer=1, lane=1)]
    )
    assert shard.calls == [5, 2]
    assert endpoint.answers["a", 0].tolist() == [[2.0] * HIDDEN] * 2
    assert endpoint.answers["b", 0].tolist() == [[4.0] * HIDDEN] * 3
    assert endpoint.answers["a", 1].tolist() == [[6.0] * HIDDEN] * 2
    snapshot = worker.snapshot()
    assert (snapshot["frames"], snapshot["rides"], snapshot["tokens"]) == (3, 2, 7)
    assert snapshot["hops"]["boarding"]["count"] == 3


def test_new_frames_board_rides_that_wait():
    _, _, shard = served(
        [arrival("a", 1.0), arrival("b", 1.0, layer=1)], [arrival("c", 1.0, layer=1)]
    )
    assert shard.calls == [2, 4]


def test_a_frame_sent_again_replaces_the_one_that_waits():
    waits = arrival("b", 1.0, layer=1)
    _, endpoint, shard = served([arrival("a", 1.0), waits], [arrival("b", 5.0, layer=1)])
    assert shard.calls == [2, 2]
    assert endpoint.answers["b", 0][0, 0] == 10.0


def test_a_later_piece_of_the_same_lane_does_not_replace_the_one_that_waits():
    pieces = [arrival("b", 1.0 + chunk, layer=1, chunk=chunk) for chunk in (0, 1, 3)]
    _, _, shard = served([arrival("a", 1.0), *pieces[:2]], [pieces[2]])
    assert shard.calls == [2, 4]  # the third took the second's slot, the first is still there


def test_nobody_waits_for_more_than_one_piece_of_another_ones_batch():
    pieces = [arrival("long", 1.0, tokens=9, chunk=chunk) for chunk in range(2)]
    late, later = arrival("short", 2.0), arrival("short", 2.0, layer=1)
    _, _, shard = served([*pieces], [late], [later])
    # the second piece was there first, but its batch has just been served
    assert shard.calls == [9, 2, 9, 2]


@pytest.mark.parametrize(("expert", "code"), [(9, "unknown_expert"), (8, "compute_failed")])
def test_a_bad_frame_is_refused_and_its_riders_are_served(expert, code):
    worker, endpoint, _ = served(
        [arrival("a", 1.0), arrival("bad", 1.0, expert=expert), arrival("c", 2.0)],
        [arrival("a", 3.0, lane=1)],
    )
    assert endpoint.refusals == [("bad", code)]
    assert endpoint.answers["a", 0][0, 0] == 2.0
    assert endpoint.answers["c", 0][0, 0] == 4.0
    assert endpoint.answers["a", 1][0, 0] == 6.0
    assert worker.snapshot()["refused"] == 1


def test_an_answer_sent_to_an_ffn_actor_is_refused():
    answer = arrival("a", 1.0)
    answer.ids = answer.weights = answer.rows = None
    _, endpoint, _ = served([answer])
    assert endpoint.refusals == [("a", "bad_frame")]


def test_a_lost_peer_is_forgotten_with_all_its_frames():
    worker, endpoint, _ = served(
        [arrival("dead", 1.0), arrival("a", 1.0), arrival("dead", 1.0, layer=1)], gone=("dead",)
    )
    assert endpoint.disconnected == ["dead"]
    assert endpoint.answers["a", 0][0, 0] == 2.0
    assert worker.snapshot()["lost_peers"] == 1
    worker.check()


def test_frames_of_older_epochs_are_refused():
    worker, endpoint, shard = served(
        [arrival("late", 1.0, epoch=4), arrival("a", 1.0, epoch=5), arrival("b", 1.0, epoch=6)],
        [arrival("late", 1.0, epoch=4, layer=1)],
        epoch=5,
    )
    assert endpoint.refusals == [("late", "stale_epoch")] * 2
    assert endpoint.texts[0] == "frame of epoch 4, this actor serves epoch 5 and later"
    assert shard.calls == [4]
    assert sorted(peer for peer, _ in endpoint.answers) == ["a", "b"]
    assert worker.snapshot()["refused"] == 2


def test_an_epoch_counts_for_frames_that_wait_already():
    worker, endpoint, shard = served()
    endpoint.batches = [[arrival("a", 1.0), arrival("b", 1.0, layer=1)]]
    assert worker.turn()
    worker.min_epoch = 2
    assert worker.turn()
    assert shard.calls == [2]
    assert endpoint.refusals == [("b", "stale_epoch")]


def test_loads_are_sampled_and_scaled():
    frames = [arrival("a", 1.0, step=step, expert=step % 3) for step in range(16)]
    worker, _, _ = served(*([frame] for frame in frames), [arrival("a", 1.0, step=8, layer=2)])
    # Steps 0 and 8 count for eight each; a frame has two pairs of one expert.
    assert worker.loads() == {
        0: [16, 0, 16, 0, 0, 0, 0, 0, 0, 0],
        2: [16, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    }


def test_refused_frames_are_no_load():
    worker, _, _ = served([arrival("a", 1.0, expert=9, step=0)])
    assert worker.loads() == {}


def test_an_emulated_ride_lasts_its_modelled_time():
    emulate = Emulation(ffn=Line(a_s=0.01, b_s=0.02))
    _, endpoint, shard = served([arrival("a", 1.0), arrival("b", 1.0)], emulate=emulate)
    assert shard.calls == [4]
    assert all(span >= 0.06 for span in endpoint.spans)  # four pairs, for both riders
    assert len(endpoint.spans) == 2


def test_a_dead_loop_is_seen():
    worker, endpoint, _ = served()
    endpoint.poll = lambda: 1 / 0
    worker.start()
    worker._thread.join(5)
    with pytest.raises(AffluxError, match="ZeroDivisionError") as caught:
        worker.check()
    assert caught.value.code == "actor_failed"
    worker.stop()


def test_an_actor_that_has_not_started():
    actor = FFNActor()
    assert actor.ping() == "idle"
    assert actor.info()["state"] == "idle"
    with pytest.raises(AffluxError, match="idle"):
        actor.offer("attention-0")
    with pytest.raises(AffluxError, match="idle"):
        actor.grow({0: [0]})
    assert actor.watch(timeout_s=0.0) == {
        "state": "idle", "error": None, "epoch": None, "faults": [], "number": 0
    }  # fmt: skip
    actor.stop()
    assert actor.ping() == "stopped"


# ---- the real thing: an actor in the vLLM process, attention peers here -------------------------

_actors: dict[str, FFNActor] = {}


def start_actor(config: FFNConfig) -> dict[str, Any]:
    _actors[config.name] = FFNActor()
    return _actors[config.name].start(config)


def ask_actor(name: str, method: str, *args: Any) -> Any:
    return getattr(_actors[name], method)(*args)


def kill_loop(name: str) -> None:
    worker = _actors[name]._worker
    assert worker is not None
    worker.endpoint.poll = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    worker._thread.join(5)


HELD = {1: [3, 0, 15, 8], 2: list(range(16))}


@pytest.fixture(scope="module")
def model(moe_checkpoint) -> Path:
    return moe_checkpoint("deepseek_v3")


@pytest.fixture(scope="module")
def config(model) -> FFNConfig:
    return FFNConfig("ffn-0", str(model), HELD, dtype="float32", max_frame_tokens=64, threads=1)


def test_the_newest_note_is_remembered():
    actor = FFNActor()
    assert actor.info()["note"] is None
    for number in (3, 2, 5, 4):
        actor.remember({"number": number, "table": f"of {number}"})
    assert actor.info()["note"] == {"number": 5, "table": "of 5"}


@pytest.fixture
def ask(vllm_process, config) -> Iterator[Callable[..., Any]]:
    """``ask(method, *args)`` calls the started actor."""
    vllm_process(start_actor, config)
    yield lambda method, *args: vllm_process(ask_actor, config.name, method, *args)
    vllm_process(ask_actor, config.name, "stop")


def meet(ask: Callable[..., Any], name: str, model: Path, digest: str | None = None) -> Endpoint:
    """An attention peer, connected with the actor."""
    checkpoint = Checkpoint.open(model)
    geometry = Geometry(checkpoint.hidden, checkpoint.top_k, torch.float32, 64, lanes=8)
    endpoint = Endpoint(name, geometry, digest or checkpoint.digest)
    endpoint.connect(ask("offer", name))
    ask("connect", endpoint.offer("ffn-0"))
    return endpoint


def answer(endpoint: Endpoint) -> Arrival:
    (arrived,) = endpoint.wait(20.0, ["ffn-0"])
    arrived.raise_if_refused()
    return arrived


def close_enough(arrived: Arrival, expected: torch.Tensor) -> bool:
    assert arrived.x is not None
    return bool((arrived.x - expected).norm() <= 2e-6 * expected.norm())


def test_two_peers_are_served(ask, model):
    peers = [meet(ask, f"attention-{i}", model) for i in range(2)]
    reference = {layer: ReferenceExperts(model, layer) for layer in HELD}
    ids = torch.tensor([[3, 1, 8, 9], [15, 3, 4, 5], [6, 7, 9, 10]], dtype=torch.int32)
    weights = torch.rand(3, 4)
    local = torch.isin(ids, torch.tensor(HELD[1], dtype=torch.int32))
    rows = local.nonzero()[:, 0].int()
    for step in range(3):
        questions = [torch.randn(3, 128) for _ in peers]
        for peer, x in zip(peers, questions, strict=True):
            peer.dispatch("ffn-0", 0, layer=1, step=step, epoch=1, x=x,
                          ids=ids[local], weights=weights[local], rows=rows)  # fmt: skip
        for peer, x in zip(peers, questions, strict=True):
            assert close_enough(answer(peer), reference[1](x, ids, weights * local))
        for peer, x in zip(peers, questions, strict=True):
            peer.dispatch("ffn-0", 3, layer=2, step=step, epoch=1, x=x, ids=ids, weights=weights)
        for peer, x in zip(peers, questions, strict=True):
            arrived = answer(peer)
            assert arrived.header.flags & DENSE
            assert arrived.header.lane == 3
            assert close_enough(arrived, reference[2](x, ids, weights))

    facts = ask("info")
    assert facts["role"] == "ffn"
    assert facts["state"] == ask("ping") == "ready"
    assert facts["experts"] == HELD
    assert facts["allocated_bytes"] == 20 * Checkpoint.open(model).expert_bytes(1, 0)
    assert facts["peers"] == ["attention-0", "attention-1"]
    assert (facts["frames"], facts["refused"]) == (12, 0)
    assert facts["busy_seconds"] > 0
    assert facts["idle_seconds"] > 0
    assert facts["hops"]["compute"]["count"] == 12
    ask("disconnect", "attention-1")
    assert ask("info")["peers"] == ["attention-0"]
    for peer in peers:
        peer.close()


def test_bad_frames_get_an_error_and_the_loop_goes_on(ask, model):
    peer = meet(ask, "attention-0", model)
    x, ids = torch.randn(1, 128), torch.tensor([[0, 1, 2, 3]], dtype=torch.int32)
    question = {"step": 1, "epoch": 1, "x": x, "ids": ids, "weights": torch.rand(1, 4)}
    for layer, code in ((1, "unknown_expert"), (0, "unknown_layer"), (9, "unknown_layer")):
        peer.dispatch("ffn-0", 0, layer=layer, **question)
        with pytest.raises(PeerRefused, match="ffn-0 refused") as caught:
            answer(peer)
        assert caught.value.code == code
    peer.dispatch("ffn-0", 0, layer=2, **question)
    expected = ReferenceExperts(model, 2)(x, ids, question["weights"])
    assert close_enough(answer(peer), expected)
    # The same frame once more: computed again, from whatever is in it.
    peer.dispatch("ffn-0", 0, layer=2, **question)
    assert close_enough(answer(peer), expected)
    assert ask("info")["refused"] == 3
    peer.close()


def serve_while_growing(ask: Callable[..., Any], peer: Endpoint, x: torch.Tensor) -> int:
    """Frames answered right while the actor grows and shrinks, again and again."""
    over, count = threading.Event(), 0

    def change() -> None:
        for _ in range(3):
            ask("grow", {1: range(16)})
            ask("keep", HELD, 1)
        over.set()

    ids, weights = torch.tensor([[3, 0, 15, 8]], dtype=torch.int32), torch.rand(1, 4)
    question = {"layer": 1, "epoch": 1, "x": x, "ids": ids, "weights": weights}
    expected = None
    thread = threading.Thread(target=change)
    thread.start()
    while not over.is_set():
        peer.dispatch("ffn-0", 0, step=count, **question)
        arrived = answer(peer)
        assert arrived.x is not None
        expected = arrived.x.clone() if expected is None else expected
        assert torch.equal(arrived.x, expected)
        count += 1
    thread.join()
    return count


def test_frames_are_served_while_the_actor_grows(ask, model):
    peer = meet(ask, "attention-0", model)
    assert serve_while_growing(ask, peer, torch.randn(1, 128)) > 6
    peer.close()


def test_growing_and_keeping(ask, model):
    peer = meet(ask, "attention-0", model)
    x, ids, weights = torch.randn(1, 128), torch.tensor([[1, 2, 4, 5]]).int(), torch.rand(1, 4)
    question = {"layer": 1, "x": x, "ids": ids, "weights": weights}

    def code_of(**more: Any) -> str | None:
        peer.dispatch("ffn-0", 0, **question, **more)
        try:
            assert close_enough(answer(peer), ReferenceExperts(model, 1)(x, ids, weights))
        except PeerRefused as error:
            return error.code
        return None

    assert code_of(step=1, epoch=1) == "unknown_expert"
    grown = ask("grow", {1: [1, 2, 4, 5, 3]})
    expert = Checkpoint.open(model).expert_bytes(1, 0)
    assert (grown["source"], grown["bytes"], grown["failures"]) == ("checkpoint", 4 * expert, [])
    assert ask("grow", {1: [5, 1]})["source"] == "held"
    assert code_of(step=2, epoch=1) is None

    now = {1: [1, 2, 4, 5], 2: [9]}
    assert ask("keep", now, 7)["bytes"] == 19 * expert
    assert ask("keep", now, 7)["bytes"] == 0
    facts = ask("info")
    assert facts["experts"] == now
    assert facts["held_bytes"] == facts["allocated_bytes"] == 5 * expert
    assert facts["epoch"] == 7
    assert code_of(step=3, epoch=6) == "stale_epoch"
    assert code_of(step=4, epoch=7) is None
    assert code_of(step=8, epoch=8) is None
    assert facts["loads"] == {}
    assert ask("loads") == {1: [0, 8, 8, 0, 8, 8] + [0] * 10}
    assert ask("watch", 0, 0.0) == {
        "state": "ready", "error": None, "epoch": 7, "faults": [], "number": 0
    }  # fmt: skip

    with pytest.raises(AffluxError, match=r"epoch 6.*epoch 7") as caught:
        ask("keep", now, 6)
    assert caught.value.code == "stale_epoch"
    with pytest.raises(ValueError, match="grow it first"):
        ask("keep", {1: [0]}, 9)
    assert ask("info")["epoch"] == 7
    ask("keep", {}, 9)
    assert code_of(step=9, epoch=9) == "unknown_layer"
    ask("grow", now)
    assert code_of(step=10, epoch=9) is None
    peer.close()


def test_a_peer_with_another_model_is_turned_away(ask, model):
    with pytest.raises(PeerMismatch, match="attention-0"):
        meet(ask, "attention-0", model, digest="00" * 32)
    meet(ask, "attention-1", model).close()


def test_preloading_does_no_harm_to_a_running_actor(ask, vllm_process):
    vllm_process(preload)
    assert ask("ping") == "ready"


def test_starting_twice_and_a_dead_loop(ask, config, vllm_process):
    with pytest.raises(AffluxError, match="started before"):
        ask("start", config)
    vllm_process(kill_loop, config.name)
    with pytest.raises(AffluxError, match="ZeroDivisionError"):
        ask("ping")
    facts = ask("info")
    assert (facts["state"], facts["error"]) == ("failed", "division by zero")
    watched = ask("watch", 0, 60.0)
    assert (watched["state"], watched["error"]) == ("failed", "division by zero")


def test_a_model_that_can_not_be_served(vllm_process, dense_checkpoint):
    with pytest.raises(CheckpointError) as caught:
        vllm_process(start_actor, FFNConfig("ffn-9", str(dense_checkpoint), {0: [0]}))
    assert caught.value.code == "dense_model"
    facts = vllm_process(ask_actor, "ffn-9", "info")
    assert facts["state"] == "failed"
    assert "dense model" in facts["error"]
