"""A cancelled request must reach the app as a disconnect, and everything else unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from starlette.types import Message, Receive, Scope, Send

from cluster import disconnects
from cluster.disconnects import DisconnectOnCancel

HTTP: Scope = {"type": "http", "path": "/"}


async def nothing_more() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def discard(_: Message) -> None:
    pass


def like_vllm(ended: list[str]) -> Callable[[Scope, Receive, Send], object]:
    """A handler as vLLM writes them: the work is a task of its own beside one that listens."""

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("aborted")
            raise

    async def listen(receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(work()), asyncio.create_task(listen(receive))]
        _, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()

    return app


async def test_cancelling_aborts_the_work() -> None:
    ended: list[str] = []
    request = asyncio.create_task(
        DisconnectOnCancel(like_vllm(ended))(HTTP, nothing_more, discard)  # type: ignore[arg-type]
    )
    await asyncio.sleep(0.01)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0)
    assert ended == ["aborted"]


async def test_an_app_that_does_not_listen_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disconnects, "WIND_DOWN_S", 0.01)
    ended: list[str] = []

    async def deaf(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    request = asyncio.create_task(DisconnectOnCancel(deaf)(HTTP, nothing_more, discard))
    await asyncio.sleep(0.01)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    await asyncio.sleep(0.01)
    assert ended == ["cancelled"]


async def test_messages_and_errors_pass_through() -> None:
    messages = [{"type": "http.request", "body": b"a"}, {"type": "http.disconnect"}]
    got: list[Message] = []
    sent: list[Message] = []

    async def receive() -> Message:
        return messages[len(got)]

    async def send(message: Message) -> None:
        sent.append(message)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        got.append(await receive())
        got.append(await receive())
        await send({"type": "http.response.start"})
        raise KeyError("from the app")

    with pytest.raises(KeyError, match="from the app"):
        await DisconnectOnCancel(app)(HTTP, receive, send)
    assert got == messages
    assert sent == [{"type": "http.response.start"}]


async def test_other_scopes_are_left_alone() -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(receive)

    await DisconnectOnCancel(app)({"type": "lifespan"}, nothing_more, discard)
    assert seen == [nothing_more]
