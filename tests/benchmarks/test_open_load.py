"""The open loop: every request at its moment, and an end whatever the server does."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator

import pytest
from aiohttp import web

from benchmarks.load import Request
from benchmarks.open_load import ENDED, OpenLoad

bodies: list[dict] = []


async def answer(request: web.Request) -> web.StreamResponse:
    """As many tokens as asked for; a prompt that begins with 9 never gets its last one."""
    body = await request.json()
    bodies.append(body)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for token in range(body["max_tokens"]):
        if body["prompt"][0] == 9 and token == body["max_tokens"] - 1:
            await asyncio.sleep(60)
        message = {"choices": [{"index": 0, "text": "x", "token_ids": [token]}]}
        await response.write(f"data: {json.dumps(message)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
def url() -> Iterator[str]:
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), []
    bodies.clear()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        ready.set()

    def main() -> None:
        loop.run_until_complete(serve())
        loop.run_forever()

    thread = threading.Thread(target=main, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found[0]
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_requests_leave_at_their_moments(url: str):
    requests = [Request((5, 6, place), 3, at=at) for place, at in enumerate((0.0, 0.3, 0.6))]
    load = OpenLoad(url, "m", requests, concurrency=1, extra={"cache_salt": "run 1"})
    try:
        assert load.wait_done(3, 20)
        load.stop()
        streams = load.streams(10)
    finally:
        load.close()
    assert [stream.asked for stream in streams] == [0, 1, 2]
    assert not any(stream.error for stream in streams)
    for stream, at in zip(streams, (0.0, 0.3, 0.6), strict=True):
        assert stream.sent - streams[0].sent == pytest.approx(at, abs=0.15)
    assert [body["prompt"] for body in bodies] == [[5, 6, 0], [5, 6, 1], [5, 6, 2]]
    assert all(body["cache_salt"] == "run 1" and body["ignore_eos"] for body in bodies)


def test_a_stop_ends_what_would_never_end(url: str):
    requests = [Request((9,), 3), Request((5,), 3), Request((5,), 3, at=60.0)]
    load = OpenLoad(url, "m", requests, concurrency=1)
    try:
        assert load.wait_done(1, 20)
        began = time.monotonic()
        load.stop()
        streams = load.streams(20)
    finally:
        load.close()
    assert time.monotonic() - began < 15
    assert [(stream.asked, stream.error) for stream in streams] == [(0, ENDED), (1, "")]
    assert len(streams[0].tokens) == 2 and streams[0].ended > 0
