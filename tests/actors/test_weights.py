"""Where experts come from: the choice as pure arithmetic, then real reads between real actors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.checkpoint import Checkpoint
from actors.errors import AffluxError
from actors.ffn import FFNActor, FFNConfig
from actors.weights import CHECKPOINT, FAR, NEAR, LayerRows, Rates, plan
from tests.actors.test_shard_changes import differences
from tests.conftest import VLLM_ENVIRONMENT

EVERY = {0: range(8), 1: range(8), 2: range(8)}

experts = st.dictionaries(
    st.integers(0, 3), st.lists(st.integers(0, 7), max_size=8, unique=True), max_size=4
)
prints = st.sampled_from(["one", "two"])


@st.composite
def offered(draw: st.DrawFn) -> tuple[dict[int, LayerRows], str]:
    layers = {
        layer: LayerRows(draw(prints), {e: i for i, e in enumerate(ids)}, (("w", 0, 10),))
        for layer, ids in draw(experts).items()
    }
    return layers, draw(st.sampled_from([NEAR, FAR]))


@settings(deadline=None)
@given(
    experts,
    st.lists(offered(), max_size=3),
    st.dictionaries(st.integers(0, 3), prints),
    st.tuples(*[st.floats(1e6, 1e10)] * 3),
)
def test_every_expert_has_one_source_that_fits(wanted, offers, fingerprints, speeds):
    rates = Rates(dict(zip((CHECKPOINT, NEAR, FAR), speeds, strict=True)))
    parts = plan(wanted, offers, fingerprints, rates)
    placed = [(layer, e) for part in parts for layer, ids in part.experts.items() for e in ids]
    assert sorted(placed) == sorted((layer, e) for layer, ids in wanted.items() for e in ids)
    assert all(ids for part in parts for ids in part.experts.values())
    assert all(part.offer is not None for part in parts[:-1])
    for part in parts:
        if part.offer is None:
            continue
        layers, source = offers[part.offer]
        assert rates.seconds(source, 1000) < rates.seconds(CHECKPOINT, 1000)
        for layer, ids in part.experts.items():
            assert layers[layer].fingerprint == fingerprints[layer]
            assert set(ids) <= set(layers[layer].positions)


def test_rates_follow_what_is_measured():
    rates = Rates()
    assert rates.seconds(NEAR, 100) < rates.seconds(FAR, 100) < rates.seconds(CHECKPOINT, 100)
    rates.note(CHECKPOINT, 1000, 1e-9)  # too small to tell
    assert rates.snapshot() == {}
    for speed in (400e6, 100e6, 100e6, 100e6, 100e6, 100e6):
        rates.note(NEAR, int(speed), 1.0)
        rates.note(CHECKPOINT, 2 * int(speed), 0.5)
    assert rates.seconds(NEAR, 100_000_000) == pytest.approx(1.0, rel=0.1)
    assert list(rates.snapshot()) == [CHECKPOINT, NEAR]
    layers = {0: LayerRows("one", {0: 0}, (("w", 0, 10),))}
    (part,) = plan({0: [0]}, [(layers, NEAR)], {0: "one"}, rates)
    assert part.offer is None
    rates.note(FAR, 800_000_000, 1.0)
    (part,) = plan({0: [0]}, [(layers, NEAR), (layers, FAR)], {0: "one"}, rates)
    assert part.offer == 1


def test_regions_of_experts():
    rows = LayerRows("one", {7: 0, 3: 1, 5: 2}, (("a", 1000, 10), ("b", 5000, 4)))
    assert rows.regions([5, 7]) == [(1020, 10), (1000, 10), (5008, 4), (5000, 4)]
    assert rows.expert_bytes == 14


# ---- real actors ------------------------------------------------------------------------------

_actors: dict[str, FFNActor] = {}


def start_actor(config: FFNConfig) -> dict[str, Any]:
    _actors[config.name] = FFNActor()
    return _actors[config.name].start(config)


def ask_actor(name: str, method: str, *args: Any) -> Any:
    return getattr(_actors[name], method)(*args)


def wrong_layers(name: str, folder: Path, dtype: str) -> list[int]:
    worker = _actors[name]._worker
    assert worker is not None
    return differences(worker.shard, folder, dtype)


def kill_while_reading(pid: int) -> None:
    """Let the lender die between the first and the second layer that is read here next."""
    from actors.transport import reads

    real, calls = reads.Reader.read, [0]

    def read(self: Any, source: Any, into: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            reads.Reader.read = real  # type: ignore[method-assign]
            os.kill(pid, signal.SIGKILL)
        real(self, source, into)

    reads.Reader.read = read  # type: ignore[method-assign]


def left_over() -> tuple[list[str], int]:
    """Threads and System V shared memory segments of this process."""
    threads = [t.name for t in threading.enumerate() if "lends" in t.name]
    lines = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return threads, sum(line.split()[4] == str(os.getpid()) for line in lines)


@pytest.fixture(scope="module")
def other_process() -> Iterator[Callable[..., Any]]:
    """A second process for actors, that a test may kill."""
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in VLLM_ENVIRONMENT.items():
            environment.setenv(name, value)
        pool.submit(os.getpid).result()
    yield lambda function, *args: pool.submit(function, *args).result(timeout=240)
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown()


def config(name: str, model: Path, held: Any, **more: Any) -> FFNConfig:
    return FFNConfig(name, str(model), held, dtype="float32", threads=1, **more)


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "stacked", "gpt_oss", "llama4", "granitemoe", "flex_olmo"]
)
def test_an_actor_starts_and_grows_from_a_peers_memory(
    vllm_process, other_process, moe_checkpoint, family
):
    folder = moe_checkpoint(family)
    layers = Checkpoint.open(folder).moe_layers
    before = vllm_process(left_over)
    other_process(start_actor, config("ffn-0", folder, {n: range(8) for n in layers}))
    offer = other_process(ask_actor, "ffn-0", "export", {n: [6, 1, 0, 5] for n in layers})
    expert = Checkpoint.open(folder).expert_bytes(layers[0], 0)
    assert offer.nbytes == 4 * expert * len(layers)
    assert other_process(ask_actor, "ffn-0", "info")["exports"] == 1

    # The exporter may change what it holds: what it offered stays as it was.
    other_process(ask_actor, "ffn-0", "keep", {layers[0]: [2]}, 1)
    facts = vllm_process(
        start_actor, config("ffn-1", folder, {n: [5, 0] for n in layers}, offers=[offer])
    )
    assert facts["grow"]["source"] == "ffn-0"
    assert facts["grow"]["bytes"] == facts["held_bytes"] == 2 * expert * len(layers)
    assert vllm_process(wrong_layers, "ffn-1", folder, "float32") == []

    wanted = {n: [1, 3] for n in layers}  # 3 is not offered
    grown = vllm_process(ask_actor, "ffn-1", "grow", wanted, [offer])
    assert grown["source"] == "ffn-0+checkpoint"
    assert grown["bytes"] == 2 * expert * len(layers)
    assert vllm_process(wrong_layers, "ffn-1", folder, "float32") == []
    vllm_process(ask_actor, "ffn-1", "keep", {layers[0]: [1, 5]}, 1)
    assert vllm_process(wrong_layers, "ffn-1", folder, "float32") == []

    assert other_process(ask_actor, "ffn-0", "unexport", offer.token)
    assert not other_process(ask_actor, "ffn-0", "unexport", offer.token)
    grown = vllm_process(ask_actor, "ffn-1", "grow", wanted, [offer])
    assert (grown["source"], len(grown["failures"])) == ("checkpoint", 1)
    assert vllm_process(wrong_layers, "ffn-1", folder, "float32") == []
    vllm_process(ask_actor, "ffn-1", "stop")
    other_process(ask_actor, "ffn-0", "stop")
    assert other_process(left_over)[0] == []
    assert vllm_process(left_over) == before


def test_offers_that_do_not_fit_are_not_read(vllm_process, other_process, moe_checkpoint):
    folder = moe_checkpoint("qwen3_moe")
    other_process(start_actor, config("ffn-2", moe_checkpoint("olmoe"), EVERY))
    with pytest.raises(AffluxError) as caught:
        other_process(ask_actor, "ffn-2", "export", {})
    assert caught.value.code == "nothing_to_export"
    offer = other_process(ask_actor, "ffn-2", "export", EVERY)
    facts = vllm_process(start_actor, config("ffn-3", folder, EVERY, offers=[offer]))
    assert facts["grow"]["source"] == "checkpoint"
    assert facts["grow"]["failures"] == []
    assert vllm_process(wrong_layers, "ffn-3", folder, "float32") == []
    vllm_process(ask_actor, "ffn-3", "stop")
    other_process(ask_actor, "ffn-2", "stop")


def test_a_peer_that_dies_in_the_middle(vllm_process, other_process, moe_checkpoint):
    """Last in this file: it kills the other process."""
    folder = moe_checkpoint("qwen3_moe")
    other_process(start_actor, config("ffn-4", folder, EVERY))
    offer = other_process(ask_actor, "ffn-4", "export", EVERY)
    vllm_process(start_actor, config("ffn-5", folder, {0: [3], 1: [3], 2: []}))
    vllm_process(kill_while_reading, other_process(os.getpid))
    grown = vllm_process(ask_actor, "ffn-5", "grow", EVERY, [offer])
    (failure,) = grown["failures"]
    assert failure.startswith("ffn-4: ")
    assert grown["source"] == "checkpoint"
    assert vllm_process(ask_actor, "ffn-5", "info")["experts"] == {
        n: [3, 0, 1, 2, 4, 5, 6, 7] if n < 2 else list(range(8)) for n in range(3)
    }
    assert vllm_process(wrong_layers, "ffn-5", folder, "float32") == []
    # Gone for good by now: it is not even reached.
    vllm_process(ask_actor, "ffn-5", "keep", {}, 1)
    grown = vllm_process(ask_actor, "ffn-5", "grow", EVERY, [offer])
    assert (grown["source"], len(grown["failures"])) == ("checkpoint", 1)
    assert vllm_process(wrong_layers, "ffn-5", folder, "float32") == []
    vllm_process(ask_actor, "ffn-5", "stop")
