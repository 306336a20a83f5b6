"""Traces from the front door to an actor's steps, over a real OTLP receiver; no Ray, no model."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("vllm")

from fastapi import FastAPI, HTTPException, Request
from httpx import ASGITransport, AsyncClient
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)

from actors.request_spans import MAX_STEPS, RequestSpans
from actors.tracing import Tracing, TracingConfig
from cluster.configs import attention_config, tracing
from cluster.pool import AttentionPool
from cluster.spec import SpecError, load_spec
from cluster.tracing import FrontDoorTraces
from tests.otlp import Received, Receiver

WAIT_S = 30.0
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE}-{CALLER}-{flag}" for flag in ("01", "00"))


class Remote:
    """A method as Ray's handles have them."""

    def __init__(self, function: Callable[..., Any]):
        self.remote = function

    def options(self, **options: Any) -> Remote:
        return self


class Actor:
    """An attention actor whose steps are made by the test; its spans are the real ones."""

    def __init__(self, tracing: Tracing):
        stats = SimpleNamespace(idle_seconds=0.0, steps=0)
        self.client = SimpleNamespace(stats=stats, epoch=1, lanes=2, step_tokens=3)
        self.spans = RequestSpans(tracing, self.client)  # type: ignore[arg-type]
        self.requests: dict[str, Any] = {}
        self.emitted: dict[str, tuple[int, ...]] = {}
        self.arrived = asyncio.Event()
        self.outbox: asyncio.Queue[Any] = asyncio.Queue()
        self.outbox.put_nowait(None)
        self.add_request = Remote(self._add)
        self.outputs = Remote(self._outputs)
        self.abort = Remote(self._abort)

    async def _add(self, request: EngineCoreRequest, emitted: tuple[int, ...]) -> None:
        prompt = request.prompt_token_ids or []
        made = SimpleNamespace(
            request_id=request.request_id,
            trace_headers=request.trace_headers,
            num_prompt_tokens=len(prompt),
            num_computed_tokens=0,
            prefill_stats=None,
            events=[],
        )
        self.requests[request.request_id] = made
        self.emitted[request.request_id] = emitted
        self.spans.admitted(made, len(emitted))
        self.arrived.set()

    async def _abort(self, ids: list[str]) -> None:
        self.spans.ended(ids, "abort")

    async def _outputs(self, client: int) -> AsyncIterator[Awaitable[Any]]:
        while True:
            message = await self.outbox.get()
            if message is StopAsyncIteration:
                return
            ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            ready.set_result(message)
            yield ready

    def step(
        self, request_id: str, end: FinishReason | None = None, *, output: bool = True, **more: Any
    ) -> None:
        """One engine step with this request; without ``output`` a part of its prompt."""
        began = time.perf_counter()
        request = self.requests[request_id]
        if request.num_computed_tokens == 0:
            for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED):
                request.events.append(EngineCoreEvent.new_event(kind))
        self.client.stats.steps += 1
        self.client.stats.idle_seconds += 0.001
        request.num_computed_tokens += 1
        outputs = EngineCoreOutputs()
        if output:
            events, request.events = request.events, []
            made = EngineCoreOutput(request_id, [7], finish_reason=end, events=events, **more)
            made.trace_headers = request.trace_headers
            outputs.outputs = [made]
        self.spans.stepped(began, {0: outputs})
        self.outbox.put_nowait(outputs)

    def die(self) -> None:
        self.outbox.put_nowait(StopAsyncIteration)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def make(receiver: Receiver) -> Iterator[Callable[..., Tracing]]:
    made: list[Tracing] = []

    def tracing(service: str, name: str, ratio: float = 1.0) -> Tracing:
        config = TracingConfig(receiver.url, sample_ratio=ratio, deployment="demo")
        made.append(Tracing(config, service, name))
        return made[-1]

    yield tracing
    for one in made:
        one.close()


class Door:
    """An app over a pool behind the tracing middleware, with a client."""

    def __init__(self, tracing: Tracing):
        self.traces = FrontDoorTraces(tracing)
        self.pool = AttentionPool(0, traces=self.traces)
        app = FastAPI()
        app.post("/v1/completions")(self._complete)
        app.get("/v1/responses/{response}")(self._missing)
        app.get("/health")(self._health)
        transport = ASGITransport(self.traces.around(app))  # type: ignore[arg-type]
        self.client = AsyncClient(transport=transport, base_url="http://door")
        self.last: EngineCoreOutput | None = None

    async def ask(self, *ids: str, **headers: str) -> Any:
        return await self.client.post(f"/v1/completions?ids={','.join(ids)}", headers=headers)

    async def _complete(self, request: Request) -> dict[str, int]:
        ids = request.query_params["ids"].split(",")
        for request_id in ids:
            await self.pool.add_request_async(engine_request(request_id))
        tokens = 0
        while ids:
            for output in (await self.pool.get_output_async()).outputs:
                self.last = output
                tokens += len(output.new_token_ids)
                if output.finish_reason is not None:
                    ids.remove(output.request_id)
        return {"tokens": tokens}

    async def _missing(self, response: str) -> None:
        raise HTTPException(503)

    async def _health(self) -> None:
        return None


def engine_request(id_: str) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=id_,
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1000),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def one(spans: list[Received]) -> Received:
    (span,) = spans
    return span


async def soon(waiting: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(waiting, WAIT_S)


async def test_a_request_from_door_to_steps(receiver: Receiver, make: Any) -> None:
    front, back = make("afflux-frontend", "frontend-0"), make("afflux-attention", "attention-0")
    door, actor = Door(front), Actor(back)
    door.pool.set_actors({"attention-0": actor})
    asked = asyncio.ensure_future(door.ask("r", traceparent=SAMPLED))
    await soon(actor.arrived.wait())
    actor.step("r", output=False)  # the first part of the prompt
    actor.step("r")
    for _ in range(MAX_STEPS):
        actor.step("r")
    actor.step("r", FinishReason.LENGTH)
    assert (await soon(asked)).json() == {"tokens": MAX_STEPS + 2}
    for end in (front, back):
        end.flush()

    http = one(receiver.named("POST /v1/completions"))
    assert (http.trace, http.parent) == (TRACE, CALLER)
    assert http.attributes["http.route"] == http.attributes["url.path"] == "/v1/completions"
    assert http.attributes["http.response.status_code"] == 200 and not http.failed
    assert http.resource["service.name"] == "afflux-frontend"
    assert http.resource["deployment"] == "demo"
    assert http.resource["actor_id"] == "frontend-0"

    stay = one(receiver.named("stay"))
    assert (stay.trace, stay.parent) == (TRACE, http.id)
    assert stay.attributes == {
        "afflux.request_id": "r",
        "afflux.actor": "attention-0",
        "afflux.replay": 0,
        "afflux.tokens_before": 0,
        "afflux.end": "length",
        "afflux.tokens": MAX_STEPS + 2,
    }
    phases = [one(receiver.named(name)) for name in ("queue", "prefill", "decode")]
    for phase in phases:
        assert (phase.trace, phase.parent) == (TRACE, stay.id)
        assert phase.resource["service.name"] == "afflux-attention"
        assert phase.resource["actor_id"] == "attention-0"
    queue, prefill, decode = phases
    assert queue.begin <= queue.end == prefill.begin <= prefill.end == decode.begin <= decode.end
    assert decode.attributes["afflux.end"] == "length"
    assert decode.attributes["afflux.steps"] == MAX_STEPS + 3

    steps = receiver.named("step")
    assert len(steps) == MAX_STEPS, "bounded"
    assert [step.parent for step in steps[:3]] == [prefill.id, prefill.id, decode.id]
    assert steps[0].attributes["afflux.step"] == 1
    for step in steps:
        assert step.attributes["afflux.lanes"] == 2 and step.attributes["afflux.batch_tokens"] == 3
        assert 0 <= step.attributes["afflux.wait_seconds"] <= 0.001
        assert step.begin <= step.end
    assert door.last is not None and door.last.trace_headers is not None
    handed = door.last.trace_headers["traceparent"]
    assert handed == f"00-{TRACE}-{http.id}-01", "vLLM's own span hangs below the door's"
    assert receiver.paths == {"/v1/traces"}
    assert not actor.spans.followed
    door.pool.shutdown()


async def test_a_replay_is_two_stays(receiver: Receiver, make: Any) -> None:
    front = make("afflux-frontend", "frontend-0")
    backs = {name: make("afflux-attention", name) for name in ("attention-0", "attention-1")}
    door, actors = Door(front), {name: Actor(back) for name, back in backs.items()}
    door.pool.set_actors({"attention-0": actors["attention-0"]})
    asked = asyncio.ensure_future(door.ask("r"))
    await soon(actors["attention-0"].arrived.wait())
    for _ in range(3):
        actors["attention-0"].step("r")
    actors["attention-0"].die()
    door.pool.set_actors(actors)
    await soon(actors["attention-1"].arrived.wait())
    assert actors["attention-1"].emitted["r"] == (7, 7, 7)
    actors["attention-1"].step("r")
    actors["attention-1"].step("r", FinishReason.STOP)
    await soon(asked)
    for end in (front, *backs.values()):
        end.flush()

    http = one(receiver.named("POST /v1/completions"))
    assert http.parent == ""
    first, second = receiver.named("stay")
    assert {first.parent, second.parent} == {http.id}
    assert (first.attributes["afflux.end"], second.attributes["afflux.end"]) == ("lost", "stop")
    assert first.failed and not second.failed
    assert "attention-0 is gone" in first.attributes["afflux.reason"]
    assert (first.attributes["afflux.replay"], second.attributes["afflux.replay"]) == (0, 1)
    assert second.attributes["afflux.actor"] == "attention-1"
    assert second.attributes["afflux.tokens_before"] == first.attributes["afflux.tokens"] == 3
    assert second.attributes["afflux.tokens"] == 2
    ours = [one([s for s in receiver.named("queue") if s.parent == x.id]) for x in (first, second)]
    assert [span.resource["actor_id"] for span in ours] == ["attention-0", "attention-1"]
    assert ours[1].attributes["afflux.tokens_before"] == 3
    door.pool.shutdown()


async def test_choices_are_stays_of_one_request(receiver: Receiver, make: Any) -> None:
    front, back = make("afflux-frontend", "frontend-0"), make("afflux-attention", "attention-0")
    door, actor = Door(front), Actor(back)
    door.pool.set_actors({"attention-0": actor})
    asked = asyncio.ensure_future(door.ask("0-r", "1-r"))
    while len(actor.requests) < 2:
        await asyncio.sleep(0)
    actor.step("0-r", FinishReason.STOP)
    actor.step("1-r", FinishReason.ERROR, stop_reason="[step_failed] no memory")
    await soon(asked)
    front.flush()
    back.flush()
    http = one(receiver.named("POST /v1/completions"))
    stays = receiver.named("stay")
    assert [stay.parent for stay in stays] == [http.id] * 2
    assert [stay.attributes["afflux.end"] for stay in stays] == ["stop", "error"]
    assert [span.failed for span in receiver.named("prefill")] == [False, True]
    assert not receiver.named("decode"), "they ended with their first token"
    door.pool.shutdown()


@pytest.mark.parametrize(("ratio", "headers"), [(0.0, {}), (1.0, {"traceparent": UNSAMPLED})])
async def test_what_is_not_sampled(
    receiver: Receiver, make: Any, ratio: float, headers: dict[str, str]
) -> None:
    front = make("afflux-frontend", "frontend-0", ratio)
    back = make("afflux-attention", "attention-0")
    door, actor = Door(front), Actor(back)
    door.pool.set_actors({"attention-0": actor})
    asked = asyncio.ensure_future(door.ask("r", **headers))
    await soon(actor.arrived.wait())
    sent = actor.requests["r"].trace_headers
    flags = int(sent["traceparent"].split("-")[3], 16)
    assert not flags & 1, "so that vLLM does not begin a trace of its own"
    assert not actor.spans.followed
    actor.step("r")
    actor.step("r", FinishReason.LENGTH)
    await soon(asked)
    front.flush()
    back.flush()
    assert not receiver.spans
    door.pool.shutdown()


async def test_an_aborted_request(receiver: Receiver, make: Any) -> None:
    front, back = make("afflux-frontend", "frontend-0"), make("afflux-attention", "attention-0")
    door, actor = Door(front), Actor(back)
    door.pool.set_actors({"attention-0": actor})
    await door.pool.add_request_async(engine_request("r"))
    await soon(actor.arrived.wait())
    actor.step("r")
    await door.pool.abort_requests_async(["r"])
    while actor.spans.followed:
        await asyncio.sleep(0)
    front.flush()
    back.flush()
    stay = one(receiver.named("stay"))
    assert stay.parent == "" and stay.attributes["afflux.end"] == "abort"
    assert one(receiver.named("decode")).attributes["afflux.end"] == "abort"
    door.pool.shutdown()


async def test_errors_and_health_at_the_door(receiver: Receiver, make: Any) -> None:
    front = make("afflux-frontend", "frontend-0")
    door = Door(front)
    assert (await door.client.get("/health")).status_code == 200
    assert (await door.client.get("/v1/responses/secret")).status_code == 503
    front.flush()
    span = one(receiver.spans)
    assert span.name == "GET /v1/responses/{response}" and span.failed
    assert span.attributes["http.response.status_code"] == 503

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("no")

    app: Any = door.traces.around(broken)
    with pytest.raises(RuntimeError):
        await AsyncClient(transport=ASGITransport(app), base_url="http://door").get("/x")
    front.flush()
    (broke,) = receiver.named("GET")
    assert broke.failed and broke.events == ("exception",)


async def test_a_fault_in_a_trace_costs_no_request(make: Any) -> None:
    actor = Actor(make("afflux-attention", "attention-0"))
    request = engine_request("r")
    request.trace_headers = {"traceparent": SAMPLED}
    await actor._add(request, ())
    del actor.requests["r"].num_computed_tokens, actor.client.lanes
    actor.spans.stepped(time.perf_counter(), {0: EngineCoreOutputs()})
    assert actor.spans.failed and not actor.spans.followed
    actor.spans.admitted(request, 0)
    actor.spans.ended(["r"], "abort")
    assert not actor.spans.followed


def test_a_receiver_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """Spans are made as fast as ever, the end does not wait for long, and the log is short."""
    with Receiver() as receiver:
        url = receiver.url
    for protocol in ("http/protobuf", "grpc"):
        caplog.clear()
        began = time.monotonic()
        tracing = Tracing(TracingConfig(url, protocol), "afflux-frontend", "frontend-0")
        for _ in range(3000):
            tracing.tracer.start_span("x").end()
        assert time.monotonic() - began < 3.0
        tracing.close()
        tracing.close()
        assert time.monotonic() - began < 10.0
        assert 1 <= len(caplog.records) <= 8, [record.getMessage() for record in caplog.records]


def test_the_spec_says_where() -> None:
    spec = load_spec(None, [])
    config = attention_config(spec, "attention-0", secret=b"", address=None)
    assert tracing(spec) is None and config.tracing is None
    spec = load_spec(
        None,
        [
            "name=demo",
            "tracing.otlp_endpoint=http://collector:4317",
            "tracing.protocol=grpc",
            "tracing.sample_ratio=0.25",
        ],
    )
    expected = TracingConfig("http://collector:4317", "grpc", 0.25, "demo")
    config = attention_config(spec, "attention-0", secret=b"", address=None)
    assert tracing(spec) == config.tracing == expected
    for wrong in ("otlp_endpoint=collector:4317", "protocol=udp", "sample_ratio=2"):
        with pytest.raises(SpecError, match="tracing"):
            load_spec(None, [f"tracing.{wrong}"])


def test_off_means_not_imported() -> None:
    """vLLM and Ray import some of OpenTelemetry themselves; what only we need stays away."""
    code = """
import sys
import actors.tracing, cluster.configs, cluster.spec
assert not [name for name in sys.modules if name.startswith("opentelemetry")], "at once"
import actors.attention, cluster.frontend
spec = cluster.spec.load_spec(None, [])
assert cluster.frontend.trace(spec, "frontend-0") is None
assert not {"cluster.tracing", "actors.request_spans"} & sys.modules.keys()
print("fine")
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.strip() == "fine", done.stderr
