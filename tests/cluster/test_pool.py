"""The pool over real Ray actors with a scripted engine: routing, streams, aborts, lost actors.

The actors here answer like an attention actor but count instead of computing, so that the pool's
part is tested in seconds. Real engines are in ``tests/e2e``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray")
pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.v1.engine import (  # noqa: E402
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient  # noqa: E402

from actors.errors import AffluxError  # noqa: E402
from cluster.flights import MAX_REPLAYS, Member  # noqa: E402
from cluster.pool import AttentionPool, NoAttentionActor, RequestLost, engine_client  # noqa: E402
from cluster.request_metrics import RequestMetrics  # noqa: E402
from cluster.spec import SLOSpec  # noqa: E402

WAIT_S = 40.0


class Counter:
    """Emits one token per step and request, counting up from the prompt's length."""

    def __init__(self, step_s: float = 0.005):
        self.step_s = step_s
        self.lost_experts = False
        self.signs = 0
        self.paused = False
        self.requests: dict[str, tuple[EngineCoreRequest, int]] = {}
        self.aborted: list[str] = []
        self.outboxes: dict[int, asyncio.Queue[Any]] = {}

    async def warm(self) -> None:
        import vllm.v1.engine  # noqa: F401

    def _outbox(self, client: int) -> asyncio.Queue[Any]:
        return self.outboxes.setdefault(client, asyncio.Queue())

    async def lose_experts(self, lost: bool) -> None:
        self.lost_experts = lost

    async def pause(self, paused: bool) -> None:
        self.paused = paused

    async def heard(self) -> int:
        return self.signs

    async def add_request(self, request: EngineCoreRequest, emitted: tuple[int, ...] = ()) -> None:
        if request.prompt_token_ids == [13]:
            raise AffluxError("thirteen is refused", code="unlucky")
        if self.paused:
            raise AffluxError("attention actor is loading, not ready", code="not_running")
        assert list(emitted) == count(len(request.prompt_token_ids or []), len(emitted))
        fresh = not self.requests
        self.requests[request.request_id] = (request, len(emitted))
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
                tokens = [len(prompt) + emitted]
                if prompt == [98] and emitted == 2 and self.lost_experts:
                    tokens = []
                    reason, stop = FinishReason.ERROR, "[peer_lost] layer 3: ffn-1 is gone"
                output = EngineCoreOutput(id_, tokens, finish_reason=reason, stop_reason=stop)
                if emitted == 0:
                    scheduled = EngineCoreEvent.new_event(EngineCoreEventType.SCHEDULED)
                    output.events = [scheduled]
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

    async def outputs(self, client: int) -> AsyncIterator[EngineCoreOutputs | None]:
        previous = self.outboxes.pop(client, None)
        if previous is not None:
            previous.put_nowait(None)  # a new call takes over from an older one
        outbox = self._outbox(client)
        yield None
        while (message := await outbox.get()) is not None:
            yield message

    async def listening(self, client: int) -> None:
        self.signs += 1

    async def utility(self, method: str, *args: Any) -> Any:
        if method == "list_loras":
            return {1, 2}
        if method == "get_supported_tasks":
            return ("generate",)
        raise AffluxError(f"no {method}", code="no_such_utility")

    async def seen(self) -> tuple[list[str], list[str]]:
        return list(self.requests), self.aborted


class Caller:
    """Holds a pool and is cancelled in the middle of a request, as Serve cancels its replicas."""

    def __init__(self) -> None:
        self.aborting = asyncio.Event()

    async def warm(self) -> None:
        pass

    async def leave(self, actor: Any, id_: str) -> None:
        pool = AttentionPool(1)
        pool.set_actors({"attention-0": actor})
        await pool.add_request_async(request(id_, tokens=100_000))
        await pool.get_output_async()
        self.aborting.set()
        try:
            await asyncio.Event().wait()
        finally:
            await pool.abort_requests_async([id_])

    async def wait_aborting(self) -> None:
        await self.aborting.wait()
        self.aborting.clear()


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


def count(start: int, tokens: int) -> list[int]:
    """What a ``Counter`` answers to a prompt of ``start`` tokens."""
    return list(range(start, start + tokens))


async def join(pool: AttentionPool, actors: dict[str, Any]) -> None:
    """Make ``actors`` the members and wait until all take requests."""
    pool.set_actors(actors)

    async def listening() -> bool:
        return all(member.open for member in pool._members.values())

    await until(listening)


async def emitted(pool: AttentionPool, id_: str, tokens: int) -> list[int]:
    """Read outputs until a request has emitted at least ``tokens``; returns what it has."""
    got: list[int] = []

    async def read() -> None:
        while len(got) < tokens:
            for output in (await pool.get_output_async()).outputs:
                assert output.request_id == id_ and output.finish_reason is None
                got.extend(output.new_token_ids)

    await asyncio.wait_for(read(), WAIT_S)
    return got


async def until(condition: Any) -> None:
    async def poll() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), WAIT_S)


async def test_streams_from_all_actors(actors: dict[str, Any]) -> None:
    pool = AttentionPool(7)
    await join(pool, actors)
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
    await join(pool, one)
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


async def test_without_actors_requests_wait(
    actors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = AttentionPool(1, wait_s=WAIT_S)
    with pytest.raises(NoAttentionActor, match="no attention actor is alive"):
        await pool.get_supported_tasks_async()
    assert not pool.resources.engine_dead, "it can come back"
    for id_ in ("first", "second", "third", "aborted"):
        await pool.add_request_async(request(id_))
    await pool.abort_requests_async(["aborted"])
    assert list(pool.flights) == ["first", "second", "third"] and not pool.open
    one = {"attention-0": actors["attention-0"]}
    pool.set_actors(one, draining=["attention-0"])
    assert {flight.actor for flight in pool.flights.values()} == {None}, "it takes nothing new"
    sent: list[str] = []
    post = pool._post
    monkeypatch.setattr(
        pool, "_post", lambda member, flight: (sent.append(flight.id), post(member, flight))
    )
    pool.set_actors(one)
    results = await collect(pool, {"first", "second", "third"})
    assert all(end == FinishReason.LENGTH for _, end in results.values())
    assert sent == ["first", "second", "third"], "in the order of arrival"
    pool.shutdown()


async def test_waiting_has_an_end() -> None:
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, wait_s=0.05, on_failure=lambda ids, why: failures.append((ids, why)))
    await pool.add_request_async(request("r"))
    assert (await collect(pool, {"r"}))["r"] == ([], FinishReason.ERROR)
    ((ids, reason),) = failures
    assert ids == ["r"] and isinstance(reason, NoAttentionActor)
    assert "within 0.05 s" in str(reason) and reason.http_status == 503
    pool.shutdown()


async def test_members_change_while_running(actors: dict[str, Any]) -> None:
    """A member that is taken away alive: its requests go on elsewhere, and end where they were."""
    pool = AttentionPool(1)
    old, new = actors["attention-0"], actors["attention-1"]
    pool.set_actors({"attention-0": old})
    await pool.add_request_async(request("a", tokens=200))
    head = await emitted(pool, "a", 20)
    pool.set_actors({"attention-1": new})
    tokens, end = (await collect(pool, {"a"}))["a"]
    assert (head + tokens, end) == (count(3, 200), FinishReason.LENGTH)
    assert pool.replays == 1

    async def aborted() -> bool:
        running, ended = await old.seen.remote()
        return "a" in ended and not running

    await until(aborted)
    pool.set_actors(actors)
    assert pool.members == ("attention-0", "attention-1")
    pool.shutdown()


async def test_a_draining_member_keeps_what_it_has(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    await join(pool, actors)
    await pool.add_request_async(request("a", tokens=60))
    (flight,) = pool.flights.values()
    (other,) = set(actors) - {flight.actor}
    pool.set_actors(actors, draining=[flight.actor])
    for i in range(4):
        await pool.add_request_async(request(f"new-{i}", prompt=[i]))
        assert pool.flights[f"new-{i}"].actor == other
    results = await collect(pool, {"a", *(f"new-{i}" for i in range(4))})
    assert results["a"] == (count(3, 60), FinishReason.LENGTH)
    assert pool.replays == 0
    pool.shutdown()


async def test_a_step_without_experts_is_replayed_elsewhere(actors: dict[str, Any]) -> None:
    """The actor that says so fails again and again; the other one has its experts."""
    pool = AttentionPool(1)
    await actors["attention-0"].lose_experts.remote(True)
    await actors["attention-1"].lose_experts.remote(False)
    pool.set_actors({"attention-0": actors["attention-0"]})
    await pool.add_request_async(request("r", prompt=[98], tokens=8))
    head = await emitted(pool, "r", 2)
    pool.set_actors(actors)
    tokens, end = (await collect(pool, {"r"}))["r"]
    assert (head + tokens, end) == (count(1, 8), FinishReason.LENGTH)
    assert pool.members == ("attention-0", "attention-1"), "the actor itself is fine"
    pool.shutdown()


async def test_replays_after_faults_are_bounded(
    actors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.pool.RETRY_S", 0.001)
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, on_failure=lambda ids, why: failures.append((ids, why)))
    await actors["attention-0"].lose_experts.remote(True)
    pool.set_actors({"attention-0": actors["attention-0"]})
    await pool.add_request_async(request("r", prompt=[98], tokens=100))
    tokens, end = (await collect(pool, {"r"}))["r"]
    assert end == FinishReason.ERROR and tokens == count(1, len(tokens))
    assert pool.replays == MAX_REPLAYS
    reason = failures[0][1]
    assert isinstance(reason, RequestLost) and reason.http_status == 503
    assert "ffn-1 is gone" in str(reason) and f"after {MAX_REPLAYS} replays" in str(reason)
    pool.shutdown()


async def test_an_actor_that_is_not_ready_passes_requests_on(actors: dict[str, Any]) -> None:
    pool = AttentionPool(1)
    await actors["attention-0"].pause.remote(True)
    try:
        pool.set_actors({"attention-0": actors["attention-0"]})
        await pool.add_request_async(request("r"))

        async def refused() -> bool:
            return pool.flights["r"].refusals > 0

        await until(refused)
        pool.set_actors(actors)
        assert (await collect(pool, {"r"}))["r"] == (count(3, 5), FinishReason.LENGTH)
        assert "attention-0" in pool.members
    finally:
        await actors["attention-0"].pause.remote(False)
    pool.shutdown()


def measured(metrics: RequestMetrics, name: str, **labels: str) -> float:
    base = {"model_name": "m", "role": "frontend", "actor_id": "frontend-0"}
    value = metrics.families.registry.get_sample_value(name, {**base, **labels})
    assert value is not None, name
    return value


def ended(metrics: RequestMetrics) -> dict[str, float]:
    """Finished requests by outcome."""
    outcomes = ("stop", "length", "abort", "error")
    counts = {o: measured(metrics, "afd_requests_total", outcome=o) for o in outcomes}
    return {outcome: count for outcome, count in counts.items() if count}


async def test_metrics_hear_of_every_request(actors: dict[str, Any]) -> None:
    metrics = RequestMetrics("m", "frontend-0", SLOSpec())
    pool = AttentionPool(1, metrics=metrics)
    one = {"attention-0": actors["attention-0"]}
    await pool.add_request_async(request("r"))
    assert measured(metrics, "afd_requests_waiting") == 1
    await join(pool, one)
    assert measured(metrics, "afd_requests_running") == 1
    assert (await collect(pool, {"r"}))["r"] == (count(3, 5), FinishReason.LENGTH)
    assert ended(metrics) == {"length": 1}
    assert measured(metrics, "afd_generation_tokens_total") == 5
    assert measured(metrics, "afd_prompt_tokens_total") == 3
    assert measured(metrics, "afd_inter_token_latency_seconds_count") == 4
    ttft = measured(metrics, "afd_time_to_first_token_seconds_sum")
    queue = measured(metrics, "afd_request_queue_time_seconds_sum")
    prefill = measured(metrics, "afd_request_prefill_time_seconds_sum")
    assert queue > 0 and queue + prefill == pytest.approx(ttft)
    await pool.add_request_async(request("bad", prompt=[99]))
    await collect(pool, {"bad"})
    assert ended(metrics) == {"length": 1, "error": 1}
    assert measured(metrics, "afd_slo_requests_total", slo="both") == 2
    for id_ in ("called-off", "met-a-stop-string"):
        await pool.add_request_async(request(id_, tokens=100_000))

    async def output_handler() -> None:
        await pool.get_output_async()
        await pool.abort_requests_async(["met-a-stop-string"])

    await asyncio.create_task(output_handler())
    await pool.abort_requests_async(["called-off"])
    assert ended(metrics) == {"length": 1, "error": 1, "stop": 1, "abort": 1}
    assert measured(metrics, "afd_requests_running") == 0
    pool.shutdown()


async def test_metrics_count_replays_once_each(actors: dict[str, Any]) -> None:
    metrics = RequestMetrics("m", "frontend-0", SLOSpec())
    pool = AttentionPool(1, metrics=metrics)
    pool.set_actors({"attention-0": actors["attention-0"]})
    await pool.add_request_async(request("a", tokens=200))
    await emitted(pool, "a", 20)
    pool.set_actors({"attention-1": actors["attention-1"]})
    await collect(pool, {"a"})
    assert measured(metrics, "afd_requests_replayed_total") == pool.replays == 1
    assert measured(metrics, "afd_time_to_first_token_seconds_count") == 1
    assert measured(metrics, "afd_generation_tokens_total") == 200, "none twice"
    assert ended(metrics) == {"length": 1}
    pool.shutdown()


async def test_metrics_of_a_request_that_found_no_actor() -> None:
    metrics = RequestMetrics("m", "frontend-0", SLOSpec())
    pool = AttentionPool(1, wait_s=0.05, metrics=metrics)
    await pool.add_request_async(request("r"))
    await collect(pool, {"r"})
    assert measured(metrics, "afd_requests_rejected_total", reason="no_actor") == 1
    assert ended(metrics) == {"error": 1}
    assert measured(metrics, "afd_slo_good_requests_total", slo="ttft") == 0
    pool.shutdown()


async def test_a_session_ends_with_its_actor(actors: dict[str, Any]) -> None:
    """The parts of a streaming input are known to the actor only."""
    pool = AttentionPool(1)
    await join(pool, {"attention-0": actors["attention-0"]})
    session = request("s", tokens=100_000)
    session.resumable = True
    await pool.add_request_async(session)
    await emitted(pool, "s", 2)
    pool.set_actors({"attention-1": actors["attention-1"]})
    assert (await collect(pool, {"s"}))["s"][1] == FinishReason.ERROR
    pool.shutdown()


async def test_an_abort_outlives_the_call_that_asked_for_it(actors: dict[str, Any]) -> None:
    """Ray cancels the calls that a cancelled task has made; an abort must not be one of them."""
    caller = ray.remote(num_cpus=0)(Caller).remote()
    await asyncio.wait_for(caller.warm.remote(), 240)  # it imports vLLM
    actor = actors["attention-0"]
    for i in range(5):
        call = caller.leave.remote(actor, f"left-{i}")
        await asyncio.wait_for(caller.wait_aborting.remote(), WAIT_S)
        ray.cancel(call)
        with pytest.raises(ray.exceptions.TaskCancelledError):
            await call

        async def aborted(id_: str = f"left-{i}") -> bool:
            return id_ in (await actor.seen.remote())[1]

        await until(aborted)
    ray.kill(caller)


async def test_actors_hear_that_somebody_listens(
    actors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.pool.SIGN_S", 0.01)
    pool = AttentionPool(1)
    pool.set_actors({"attention-0": actors["attention-0"]})

    async def heard() -> bool:
        return await actors["attention-0"].heard.remote() > 2

    await until(heard)
    pool.shutdown()


async def test_times_of_all_actors_are_this_process_s(actors: dict[str, Any]) -> None:
    """Engines on other machines have other monotonic clocks."""
    member = Member("attention-0", None, 3)
    stamps = []
    for passed in (0.0, 0.01, 0.02):
        outputs = EngineCoreOutputs(
            outputs=[EngineCoreOutput("r", [1], events=[EngineCoreEvent.new_event(1, 7.0)])],  # type: ignore[arg-type]
            timestamp=1000.0 + passed,
        )
        member.label(outputs)
        stamps.append(outputs.timestamp)
        assert outputs.engine_index == 3
        assert outputs.outputs[0].events is not None
        event = outputs.outputs[0].events[0].timestamp
        assert event == pytest.approx(outputs.timestamp - 1000.0 - passed + 7.0)
    assert stamps[-1] <= time.monotonic() < stamps[-1] + 5.0


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


async def test_requests_of_a_dead_actor_go_on(actors: dict[str, Any]) -> None:
    """The last of these: it leaves one of the shared actors dead."""
    failures: list[tuple[list[str], Exception]] = []
    pool = AttentionPool(1, on_failure=lambda ids, reason: failures.append((ids, reason)))
    await join(pool, actors)
    ids = {f"r{i}" for i in range(8)}
    for i, id_ in enumerate(sorted(ids)):
        await pool.add_request_async(request(id_, prompt=[i], tokens=60))
    assert (await pool.get_output_async()).outputs
    doomed = {id_ for id_, flight in pool.flights.items() if flight.actor == "attention-0"}
    assert 0 < len(doomed) < len(ids)
    tokens = {id_: [*flight.emitted] for id_, flight in pool.flights.items()}
    while not pool._outputs.empty():  # what ``tokens`` has already
        await pool.get_output_async()
    ray.kill(actors["attention-0"])
    for id_, (rest, end) in (await collect(pool, ids)).items():
        assert (tokens[id_] + rest, end) == (count(1, 60), FinishReason.LENGTH)
    assert pool.members == ("attention-1",)
    assert pool.replays == len(doomed) and not failures
    # a manager that hasn't noticed yet doesn't bring it back
    pool.set_actors(actors)
    assert pool.members == ("attention-1",)
    await pool.add_request_async(request("later"))
    assert (await collect(pool, {"later"}))["later"][1] == FinishReason.LENGTH
    pool.shutdown()
