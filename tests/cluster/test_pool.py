"""The pool over real Ray actors with a scripted engine: routing, streams, aborts, lost actors.

The actors here answer like an attention actor but count instead of computing, so that the pool's
part is tested in seconds. Real engines are in ``tests/e2e``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray")
pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.engine import (  # noqa: E402
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient  # noqa: E402

from actors.errors import AffluxError  # noqa: E402
from cluster.pool import AttentionPool, NoAttentionActor, RequestLost, engine_client  # noqa: E402

WAIT_S = 40.0


class Counter:
    """Emits one token per step and request, counting up from the prompt's length."""

    def __init__(self, step_s: float = 0.005):
        self.step_s = step_s
        self.requests: dict[str, tuple[EngineCoreRequest, int]] = {}
        self.aborted: list[str] = []
        self.outboxes: dict[int, asyncio.Queue[Any]] = {}

    async def warm(self) -> None:
        import vllm.v1.engine  # noqa: F401

    def _outbox(self, client: int) -> asyncio.Queue[Any]:
        return self.outboxes.setdefault(client, asyncio.Queue())

    async def add_request(self, request: EngineCoreRequest) -> None:
        if request.prompt_token_ids == [13]:
            raise AffluxError("thirteen is refused", code="unlucky")
        fresh = not self.requests
        self.requests[request.request_id] = (request, 0)
        if fresh:
            self.loop = asyncio.create_task(self._steps())

    async def _steps(self) -> None:
        while self.requests:
            await asyncio.sleep(self.step_s)
            by_client: dict[int, list[EngineCoreOutput]] = {}
            for id_, (request, emitted) in list(self.requests.items()):
                prompt = request.prompt_token_ids or []
                params = request.sampling_params
                assert params is not None and params.max_tokens is not None
                last = emitted + 1 == params.max_tokens
                reason = FinishReason.LENGTH if last else None
                stop: str | None = None
                if prompt == [99] and emitted == 1:
                    reason, stop = FinishReason.ERROR, "layer 3: ffn-1 did not answer"
                output = EngineCoreOutput(
                    id_, [len(prompt) + emitted], finish_reason=reason, stop_reason=stop
                )
                by_client.setdefault(request.client_index, []).append(output)
                if reason is None:
                    self.requests[id_] = (request, emitted + 1)
                else:
                    del self.requests[id_]
            for client, outputs in by_client.items():
                self._outbox(client).put_nowait(EngineCoreOutputs(outputs=outputs))

    async def abort(self, ids: list[str]) -> None:
        for id_ in ids:
            if self.requests.pop(id_, None):
                self.aborted.append(id_)

    async def outputs(self, client: int) -> AsyncIterator[EngineCoreOutputs]:
        previous = self.outboxes.pop(client, None)
        if previous is not None:
            previous.put_nowait(None)  # a new call takes over from an older one
        outbox = self._outbox(client)
        while (message := await outbox.get()) is not None:
            yield message

    async def utility(self, method: str, *args: Any) -> Any:
        if method == "list_loras":
            return {1, 2}
        if method == "get_supported_tasks":
            return ("generate",)
        raise AffluxError(f"no {method}", code="no_such_utility")

    async def seen(self) -> tuple[list[str], list[str]]:
        return list(self.requests), self.aborted


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        ignore_reinit_error=True,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def actors(cluster: None) -> dict[str, Any]:
    """Made once: each process imports vLLM, which is what takes long here."""
    made = {f"attention-{i}": ray.remote(num_cpus=0)(Counter).remote() for i in range(2)}
    ray.get([actor.warm.remote() for actor in made.values()], timeout=240)
    return made


def request(id_: str, prompt: list[int] | None = None, tokens: int = 5) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=id_,
        prompt_token_ids=[1, 2, 3] if prompt is None else prompt,
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=tokens),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


async def collect(pool: AttentionPool, ids: set[str]) -> dict[str, tuple[list[int], FinishReason]]:
    """Read outputs until every request of ``ids`` has finished."""
    tokens: dict[str, list[int]] = {id_: [] for id_ in ids}
    ends: dict[str, FinishReason] = {}

    async def read() -> None:
        while ends.keys() < ids:
            for output in (await pool.get_output_async()).outputs:
                tokens[output.request_id] += output.new_token_ids
                if output.finish_reason is not None:
                    ends[output.request_id] = output.finish_reason

    await asyncio.wait_for(read(), WAIT_S)
    return {id_: (tokens[id_], ends[id_]) for id_ in ids}


async def until(condition: Any) -> None:
    async def poll() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), WAIT_S)


async def test_streams_from_all_actors(actors: dict[str, Any]) -> None:
    pool = AttentionPool(7)
    pool.set_actors(actors)
    ids = {f"r{i}" for i in range(20)}
    for i, id_ in enumerate(sorted(ids)):
        await pool.add_request_async(request(id_, prompt=[i, i]))
    assert {flight.actor for flight in pool.flights.values()} == set(actors)
    results = await collect(pool, ids)
    assert all(result == ([2, 3, 4, 5, 6], FinishReason.LENGTH) for result in results.values())
    assert not pool.flights
    assert all(load.requests == 0 for load in pool.loads().values())
    pool.shutdown()


async def test_two_pools_share_actors(actors: dict[str, Any]) -> None:
    pools = [AttentionPool(0), AttentionPool(1)]
    for i, pool in enumerate(pools):
        pool.set_actors(actors)
        for j in range(4):
            await pool.add_request_async(request(f"p{i}-{j}", tokens=10))
    for i, pool in enumerate(pools):
        results = await collect(pool, {f"p{i}-{j}" for j in range(4)})
        assert all(len(tokens) == 10 for tokens, _ in results.values())
        pool.shutdown()


async def test_abort_reaches_the_actor(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    one = {"attention-0": actors["attention-0"]}
    pool.set_actors(one)
    await pool.add_request_async(request("gone", tokens=100_000))
    await pool.add_request_async(request("stays", tokens=40))
    await pool.get_output_async()
    await pool.abort_requests_async(["gone", "never-heard-of"])
    assert list(pool.flights) == ["stays"]

    async def aborted() -> bool:
        return (await one["attention-0"].seen.remote())[1] == ["gone"]

    await until(aborted)
    results = await collect(pool, {"stays"} | {"gone"} - {"gone"})
    assert results["stays"][1] == FinishReason.LENGTH
    pool.shutdown()


async def test_knows_what_a_replay_needs(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    pool.set_actors({"attention-0": actors["attention-0"]})
    await pool.add_request_async(request("r", prompt=[4, 4], tokens=1000))
    for _ in range(3):
        await pool.get_output_async()
    flight = pool.flights["r"]
    assert flight.prompt == [4, 4]
    assert flight.emitted[:3] == [2, 3, 4]
    assert flight.request.sampling_params is not None
    await pool.abort_requests_async(["r"])
    pool.shutdown()


async def test_without_actors(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    with pytest.raises(NoAttentionActor, match="no attention actor is alive"):
        await pool.add_request_async(request("r"))
    with pytest.raises(NoAttentionActor):
        await pool.get_supported_tasks_async()
    assert not pool.resources.engine_dead, "it can come back"
    pool.set_actors(actors)
    await pool.add_request_async(request("r"))
    assert (await collect(pool, {"r"}))["r"][1] == FinishReason.LENGTH
    pool.shutdown()


async def test_members_change_while_running(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    pool.set_actors({"attention-0": actors["attention-0"]})
    await pool.add_request_async(request("a", tokens=100_000))
    await pool.get_output_async()
    pool.set_actors({"attention-1": actors["attention-1"]})
    assert (await collect(pool, {"a"}))["a"][1] == FinishReason.ERROR
    await pool.add_request_async(request("b"))
    assert (await collect(pool, {"b"}))["b"][1] == FinishReason.LENGTH
    pool.set_actors(actors)
    assert pool.members == ("attention-0", "attention-1")
    pool.shutdown()


async def test_a_refused_request_ends_with_the_reason(actors: dict[str, Any]) -> None:
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, on_failure=lambda ids, reason: failures.append((ids, reason)))
    pool.set_actors(actors)
    await pool.add_request_async(request("r", prompt=[13]))
    assert (await collect(pool, {"r"}))["r"] == ([], FinishReason.ERROR)
    assert "thirteen is refused" in str(failures[0][1])
    assert pool.members == ("attention-0", "attention-1"), "the actor is fine"
    pool.shutdown()


async def test_a_failed_step_tells_its_reason(actors: dict[str, Any]) -> None:
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, on_failure=lambda ids, reason: failures.append((ids, reason)))
    pool.set_actors(actors)
    await pool.add_request_async(request("r", prompt=[99]))
    tokens, end = (await collect(pool, {"r"}))["r"]
    assert end == FinishReason.ERROR and len(tokens) == 2
    assert "layer 3: ffn-1 did not answer" in str(failures[0][1])
    pool.shutdown()


async def test_utilities_ask_every_actor(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    pool.set_actors(actors)
    assert await pool.get_supported_tasks_async() == ("generate",)
    assert await pool.list_loras_async() == {1, 2}
    with pytest.raises(AffluxError, match="no reset_prefix_cache"):
        await pool.reset_prefix_cache_async()
    with pytest.raises(NotImplementedError, match="sleep is not offered"):
        await pool.sleep_async()
    pool.shutdown()


async def test_refuses_more_members_than_it_has_labels_for(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1, capacity=1)
    with pytest.raises(ValueError, match="1 actors at most"):
        pool.set_actors(actors)
    pool.shutdown()


def test_every_method_of_vllms_client_is_answered() -> None:
    """A method that AsyncLLM may call must not fall through to vLLM's bare NotImplementedError."""
    asynchronous = [name for name in vars(EngineCoreClient) if name.endswith("_async")]
    missing = [name for name in asynchronous if name not in vars(AttentionPool)]
    assert missing == []


async def test_the_factory_is_put_back() -> None:
    before = EngineCoreClient.__dict__["make_async_mp_client"]
    pool = AttentionPool(1)
    with engine_client(pool):
        assert EngineCoreClient.make_async_mp_client() is pool  # type: ignore[call-arg]
    assert EngineCoreClient.__dict__["make_async_mp_client"] is before
    pool.shutdown()


async def test_a_dead_actor_ends_its_requests_only(actors: dict[str, Any]) -> None:
    """The last of these: it leaves one of the shared actors dead."""
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, on_failure=lambda ids, reason: failures.append((ids, reason)))
    pool.set_actors(actors)
    ids = {f"r{i}" for i in range(8)}
    for i, id_ in enumerate(sorted(ids)):
        await pool.add_request_async(request(id_, prompt=[i], tokens=60))
    await pool.get_output_async()
    doomed = {id_ for id_, flight in pool.flights.items() if flight.actor == "attention-0"}
    assert 0 < len(doomed) < len(ids)
    ray.kill(actors["attention-0"])
    results = await collect(pool, ids)
    assert {id_ for id_, (_, end) in results.items() if end == FinishReason.ERROR} == doomed
    assert pool.members == ("attention-1",)
    (failed, reason), *rest = failures
    assert set(failed) == doomed and not rest
    assert isinstance(reason, RequestLost) and "attention-0 is gone" in str(reason)
    assert reason.http_status == 503
    # new requests go to the one that lives
    await pool.add_request_async(request("later"))
    assert (await collect(pool, {"later"}))["later"][1] == FinishReason.LENGTH
    pool.shutdown()
