"""A cancelled request must reach the app as a disconnect, and everything else unchanged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from ray.exceptions import TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from cluster import disconnects
from cluster.disconnects import DisconnectOnCancel, note

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


async def start_and_finish(scope: Scope, receive: Receive, send: Send) -> None:
    note("engine-1")
    await asyncio.create_task(start_another())


async def start_another() -> None:
    note("engine-2")


async def test_what_an_abandoned_request_started_is_told() -> None:
    """Also what a task of the app started, and also when the app swallows its end."""
    told: list[set[str]] = []
    running = asyncio.Event()

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        await start_and_finish(scope, receive, send)
        running.set()
        assert (await receive())["type"] == "http.disconnect"
        assert (await receive())["type"] == "http.disconnect", "it stays so"

    middleware = DisconnectOnCancel(stubborn, told.append)
    request = asyncio.create_task(middleware(HTTP, nothing_more, discard))
    await running.wait()
    note("not of this request")
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert told == [{"engine-1", "engine-2"}]


async def test_a_disconnect_that_the_server_tells_counts_as_well() -> None:
    """By its message, or by a ``receive`` that Ray cancelled together with the request."""
    told: list[set[str]] = []
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await start_and_finish(scope, receive, send)
        seen.append(await receive())

    async def gone() -> Message:
        return {"type": "http.disconnect"}

    async def cancelled() -> Message:
        raise TaskCancelledError

    for receive in (gone, cancelled):
        await DisconnectOnCancel(app, told.append)(HTTP, receive, discard)
    assert seen == [{"type": "http.disconnect"}] * 2
    assert told == [{"engine-1", "engine-2"}] * 2


async def test_nothing_is_told_of_a_request_that_was_answered() -> None:
    told: list[set[str]] = []
    await DisconnectOnCancel(start_and_finish, told.append)(HTTP, nothing_more, discard)
    assert told == []


async def test_a_request_that_is_cancelled_at_once_never_starts() -> None:
    told: list[set[str]] = []
    middleware = DisconnectOnCancel(start_and_finish, told.append)
    request = asyncio.create_task(middleware(HTTP, nothing_more, discard))
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert told == []


async def test_other_scopes_are_left_alone() -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(receive)

    await DisconnectOnCancel(app)({"type": "lifespan"}, nothing_more, discard)
    assert seen == [nothing_more]
