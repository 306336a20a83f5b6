"""The load generator against a small server that speaks the same protocol."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from benchmarks.load import Load, Progress, make_requests


@dataclass
class Server:
    """Streams ``max_tokens`` tokens; what it does with a request goes by the first number of its
    prompt, if ``odd`` names that."""

    url: str = ""
    odd: dict[int, str] = field(default_factory=dict)
    bodies: list[dict] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        number = int(body["prompt"].split(".")[0])
        what = self.odd.get(number, "")
        if what == "503":
            return web.Response(status=503, text="no actor")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            for token in range(body["max_tokens"]):
                if what == "break" and token == 2:
                    assert request.transport is not None
                    request.transport.close()
                    return response
                if what == "error" and token == 2:
                    await send(response, {"error": {"message": "lost", "code": 500}})
                    break
                ids = [number, token] if what == "two" else [number]
                await send(response, {"choices": [{"index": 0, "text": "x", "token_ids": ids}]})
                await asyncio.sleep(0.002)
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.running -= 1
        return response


async def send(response: web.StreamResponse, message: dict) -> None:
    await response.write(f"data: {json.dumps(message)}\n\n".encode())


@pytest.fixture
def server() -> Iterator[Server]:
    """A running server, on a thread of its own."""
    server = Server()
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/completions", server.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_it_sends_what_was_asked_for_and_notes_every_token(server: Server):
    requests = make_requests(7, 4, tokens=(5, 9))
    load = Load(server.url, "tiny", requests, concurrency=3, minimum=10, key="secret")
    try:
        load.stop()
        streams = load.streams(60)
    finally:
        load.close()
    assert len(streams) == 10
    assert [stream.asked for stream in streams] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert server.most <= 3
    for stream in streams:
        assert stream.error == ""
        assert stream.tokens == [stream.asked] * requests[stream.asked].max_tokens
        assert len(stream.times) == len(stream.tokens)
        assert stream.sent <= stream.times[0] and stream.times == sorted(stream.times)
        assert stream.times[-1] <= stream.ended
    body = server.bodies[0]
    assert body["return_token_ids"] and body["stream"] and body["ignore_eos"]
    assert body["temperature"] == 0.0 and body["model"] == "tiny"
    assert load.progress() == Progress(10, 10, 0, sum(len(s.tokens) for s in streams))


def test_it_goes_on_until_told_to_stop(server: Server):
    load = Load(server.url, "tiny", make_requests(7, 2, tokens=(3, 4)), concurrency=2)
    try:
        assert load.wait_done(20, 60)
        load.stop()
        streams = load.streams(60)
    finally:
        load.close()
    assert len(streams) >= 20 and all(stream.ended for stream in streams)


def test_failures_have_reasons(server: Server):
    server.odd = {0: "503", 1: "break", 2: "error", 3: "two"}
    requests = make_requests(7, 5, tokens=(5, 6))
    load = Load(server.url, "tiny", requests, concurrency=2, minimum=5)
    try:
        load.stop()
        streams = load.streams(60)
    finally:
        load.close()
    reasons = [stream.error for stream in streams]
    assert "HTTP 503: no actor" in reasons[0]
    assert reasons[1]
    assert "lost" in reasons[2] and len(streams[2].tokens) == 2
    assert f"of {requests[3].max_tokens} tokens came" in reasons[3]
    assert reasons[4] == ""


def test_a_server_that_is_not_there(server: Server):
    load = Load("http://127.0.0.1:9", "tiny", make_requests(7, 1), concurrency=1, minimum=1)
    try:
        load.stop()
        (stream,) = load.streams(60)
    finally:
        load.close()
    assert "ClientConnector" in stream.error


def test_a_load_that_dies_is_noticed(server: Server):
    load = Load(server.url, "tiny", make_requests(7, 1), concurrency=1)
    load._process.kill()
    with pytest.raises(RuntimeError, match="ended by itself"):
        load.streams(60)
    load.close()


def test_requests_are_drawn_by_seed():
    assert make_requests(1, 20) == make_requests(1, 20)
    assert make_requests(1, 20) != make_requests(2, 20)
    made = make_requests(3, 48, tokens=(10, 20))
    assert len({request.prompt for request in made}) == 48
    assert {request.max_tokens for request in made} <= set(range(10, 21))
