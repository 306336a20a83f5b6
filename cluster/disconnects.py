"""Turns a cancelled request into a disconnect, so that abandoned requests leave the engine.

When a client goes away, Ray Serve cancels the task that runs the app. vLLM's handlers wait for the
ASGI message ``http.disconnect`` instead: cancelled from outside, they leave the generation running
as an orphan. This middleware stands in between. What an abandoned request still has in the engine
when its app has ended is reported, because generators that nobody closes end when the garbage
collector finds them. It knows nothing of engines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ray.exceptions import TaskCancelledError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

WIND_DOWN_S = 5.0

_noted: ContextVar[set[str] | None] = ContextVar("afflux_noted", default=None)


def note(request_id: str) -> None:
    """Tell the surrounding HTTP request, if there is one, that it started an engine request."""
    noted = _noted.get()
    if noted is not None:
        noted.add(request_id)


class DisconnectOnCancel:
    """ASGI middleware: the app sees ``http.disconnect`` when the surrounding task is cancelled.

    Args:
        app: the app to run.
        on_abandoned: called with the ids given to ``note`` during a request whose client has gone,
            after its app has ended.
    """

    def __init__(self, app: ASGIApp, on_abandoned: Callable[[set[str]], None] | None = None):
        self.app = app
        self.on_abandoned = on_abandoned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = asyncio.Event()
        noted: set[str] = set()
        token = _noted.set(noted)  # the app's task inherits it, and so do the tasks it starts
        listening = _Until(gone, receive)
        app = asyncio.ensure_future(self.app(scope, listening, send))
        _noted.reset(token)
        try:
            await asyncio.shield(app)
        except asyncio.CancelledError:
            gone.set()
            listening.disconnected = True
            await asyncio.wait([app], timeout=WIND_DOWN_S)
            if not app.done():
                app.cancel()
            elif not app.cancelled():
                app.exception()  # nobody is left to be told
            raise
        finally:
            if listening.disconnected and noted and self.on_abandoned is not None:
                self.on_abandoned(noted)


class _Until:
    """``receive`` that answers ``http.disconnect`` once ``gone`` is set."""

    def __init__(self, gone: asyncio.Event, receive: Receive):
        self.disconnected = False
        self._gone = gone
        self._receive = receive

    async def __call__(self) -> Message:
        if self.disconnected:
            return {"type": "http.disconnect"}
        message: asyncio.Future[Any] = asyncio.ensure_future(self._receive())
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([message, gone], return_when=asyncio.FIRST_COMPLETED)
            self.disconnected = self._gone.is_set() or _says_gone(message)
            return {"type": "http.disconnect"} if self.disconnected else message.result()
        finally:
            for waiting in (message, gone):
                if not waiting.done():
                    waiting.cancel()
                elif not waiting.cancelled():
                    waiting.exception()


def _says_gone(message: asyncio.Future[Message]) -> bool:
    """Whether ``receive`` has told that the client is gone: by a message, or by being cancelled.

    Serve's ``receive`` is a Ray call, and is cancelled with the request that made it.
    """
    if message.cancelled() or isinstance(message.exception(), TaskCancelledError):
        return True
    return message.exception() is None and message.result()["type"] == "http.disconnect"
