"""Admission: who takes a place, who is refused, and when to come back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from cluster.admission import LONGEST_S, SHORTEST_S, Admission, retry_after_s, runs_the_model


def scope(path: str = "/v1/completions", method: str = "POST", **more: Any) -> Scope:
    return {"type": "http", "path": path, "method": method, "headers": [], **more}


@pytest.mark.parametrize(
    "path",
    [
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/v1/responses",
        "/v1/embeddings",
        "/v1/messages",
        "/v2/rerank",
        "/inference/v1/generate",
        "/invocations",
        "/pooling",
    ],
)
def test_takes_a_place(path: str) -> None:
    assert runs_the_model(scope(path))
    assert runs_the_model(scope("/root" + path, root_path="/root"))


@pytest.mark.parametrize(
    "passing",
    [
        scope("/health", "GET"),
        scope("/metrics", "GET"),
        scope("/v1/models", "GET"),
        scope("/v1/completions", "OPTIONS"),
        scope("/tokenize"),
        scope("/detokenize"),
        scope("/v1/messages/count_tokens"),
        scope("/v1/chat/completions/render"),
        scope("/v1/responses/resp_1/cancel"),
        scope("/v1/load_lora_adapter"),
        scope("/abort_requests"),
        {"type": "lifespan"},
        {"type": "websocket", "path": "/v1/realtime"},
    ],
)
def test_passes_without_a_place(passing: Scope) -> None:
    assert not runs_the_model(passing)


class App:
    """Holds every request until told to let it go."""

    def __init__(self) -> None:
        self.held: list[asyncio.Event] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        event = asyncio.Event()
        self.held.append(event)
        await event.wait()
        if scope["path"] == "/v1/broken":
            raise KeyError("from the app")
        await send({"type": "http.response.start", "status": 200, "headers": []})


async def ask(admission: Admission, asked: Scope) -> tuple[int, dict[str, str], Any]:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    await admission(asked, receive, send)
    headers = {key.decode(): value.decode() for key, value in messages[0]["headers"]}
    body = messages[1]["body"] if len(messages) > 1 else b"null"
    return messages[0]["status"], headers, json.loads(body)


async def test_refuses_beyond_the_limit_and_frees_places() -> None:
    app = App()
    refusals: list[str] = []
    admission = Admission(app, 2, on_refused=lambda: refusals.append("refused"))
    held = [asyncio.create_task(ask(admission, scope())) for _ in range(2)]
    await asyncio.sleep(0)
    status, headers, body = await ask(admission, scope())
    assert status == 429
    assert headers["content-type"] == "application/json"
    assert SHORTEST_S <= int(headers["retry-after"]) <= LONGEST_S
    assert body["error"]["code"] == 429 and body["error"]["param"] is None
    assert body["error"]["message"].startswith("2 requests are in hand")
    assert len(app.held) == 2, "refused before the app"
    assert refusals == ["refused"]
    # what runs nothing passes
    health = asyncio.create_task(ask(admission, scope("/health", "GET")))
    await asyncio.sleep(0)
    for event in app.held:
        event.set()
    assert [(await task)[0] for task in (*held, health)] == [200, 200, 200]
    assert admission.in_hand == 0
    # an error and a cancelled request leave their place as well
    broken = asyncio.create_task(ask(admission, scope("/v1/broken")))
    cancelled = asyncio.create_task(ask(admission, scope()))
    await asyncio.sleep(0)
    assert admission.in_hand == 2
    app.held[-2].set()
    cancelled.cancel()
    results = await asyncio.gather(broken, cancelled, return_exceptions=True)
    assert isinstance(results[0], KeyError) and isinstance(results[1], asyncio.CancelledError)
    assert admission.in_hand == 0


def test_retry_after_follows_the_rate() -> None:
    assert retry_after_s([], [0.0], 0.0) == LONGEST_S, "nothing has ended: no idea"
    every_second = [float(i) for i in range(20)]
    assert retry_after_s(every_second, [20.0], 20.0) == 1
    assert retry_after_s(every_second, [19.5] * 12, 20.0) == 12, "rivals wait too"
    assert retry_after_s(every_second, [2.0] * 12, 20.0) == 1, "old refusals are over"
    assert retry_after_s([0.0], [20.0], 20.0) == 20
    assert retry_after_s(every_second, [60.0], 60.0) == LONGEST_S, "nothing lately"


@given(
    st.lists(st.floats(0, 1e6), max_size=50),
    st.lists(st.floats(0, 1e6), max_size=50),
    st.floats(0, 1e6),
)
def test_retry_after_is_bounded(finished: list[float], refused: list[float], now: float) -> None:
    now = max([now, *finished, *refused])
    assert SHORTEST_S <= retry_after_s(sorted(finished), sorted(refused), now) <= LONGEST_S
